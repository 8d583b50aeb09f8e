"""The suite for the first GPU: what one GPU can show of the trainer and its kernels in ten minutes.

    python tests/gpu/run.py [PART...] [--folder build/gpu]

Needs PyTorch 2.11 or newer with CUDA, transformers, and the wheels that dev/gpu_wheels.sh collects; no network. Part
engine_step needs SGLang and Ray too, and is skipped without. Each part is a process of its own, so that one that fails
takes no other along. Writes result.json and table.md into the folder, and exits with 1 if a part failed.
DISTILL_GPU_TINY=cpu runs the tiny form of everything on a CPU, in one process, which is quicker.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("parity", "training_step", "kernels", "buckets", "files", "engine_step")
PART_SECONDS = 600
Result = dict[str, Any]


def measure(part: str) -> Result:
    """Return what came of one part, run in this process."""
    from measured import Rows

    module, rows, begin = importlib.import_module(part), Rows(), time.monotonic()
    result: Result = {"part": part, "what": (module.__doc__ or "").strip(), "status": "passed", "why": ""}
    why = module.missing() if hasattr(module, "missing") else None
    if why is not None:
        result |= {"status": "skipped", "why": why}
    else:
        try:
            with tempfile.TemporaryDirectory(prefix="distill-gpu-") as work:
                module.measure(rows, Path(work))
            if broken := [row.what for row in rows.rows if row.holds is False]:
                result |= {"status": "failed", "why": f"out of bounds: {'; '.join(broken)}"}
        except Exception as error:
            result |= {"status": "failed", "why": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return result | {"seconds": round(time.monotonic() - begin, 1), "rows": rows.plain()}


def run(part: str) -> Result:
    """Return what came of one part, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="distill-gpu-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-W", "ignore", __file__, part, "--answer", str(answer)]
        lost: Result = {"part": part, "what": "", "status": "failed", "seconds": PART_SECONDS, "rows": []}
        try:
            done = subprocess.run(command, timeout=PART_SECONDS, check=False, stderr=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            return lost | {"why": f"not done after {PART_SECONDS} s"}
        if not answer.exists():
            return lost | {"why": f"ended with {done.returncode}: {done.stderr[-2000:]}"}
        found: Result = json.loads(answer.read_text(encoding="utf-8"))
        return found


def set_up() -> None:
    """Let this process and all its children find the repository's code, and no network."""
    path = [str(REPOSITORY / name) for name in ("crds", "workers")]
    sys.path[1:1] = path
    os.environ["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def machine() -> Result:
    """Return what this was run on."""
    import torch

    packages = ("torch", "transformers", "triton", "megatron-core", "sglang", "liger-kernel", "trl")
    found: Result = {"python": platform.python_version(), "cuda": torch.version.cuda, "packages": {}}
    for name in packages:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory}
    return found


def table(about: Result, results: list[Result]) -> str:
    """Return everything as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    lines = [f"{about.get('device', 'no GPU: the tiny form, on a CPU')}; Python {about['python']}, {versions}", ""]
    lines += ["| part | what | value | unit | bound | |", "|---|---|---:|---|---|---|"]
    for result in results:
        said = result["why"].splitlines()[0][:200] if result["why"] else "all bounds hold"
        lines.append(f"| **{result['part']}** | {result['status']}: {said} | {result['seconds']} | s | | |")
        for row in result["rows"]:
            value = "–" if row["value"] is None else f"{row['value']:.4g}"
            mark = {None: row["note"], True: "holds", False: "**broken**"}[row["holds"]]
            lines.append(f"| | {row['what']} | {value} | {row['unit']} | {row['bound']} | {mark} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "build" / "gpu")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    set_up()
    if given.answer is not None:
        given.answer.write_text(json.dumps(measure(given.parts[0])), encoding="utf-8")
        sys.stdout.flush()
        os._exit(0)  # no peer is waited for, and no group is taken down
    import torch

    tiny = os.environ.get("DISTILL_GPU_TINY") == "cpu"
    if not tiny and not torch.cuda.is_available():
        print("tests/gpu: skipped, torch sees no CUDA device here; DISTILL_GPU_TINY=cpu runs the tiny form on a CPU")
        return 0
    about, results = machine(), []
    for part in given.parts or PARTS:
        results.append(measure(part) if tiny else run(part))
        print(f"{part}: {results[-1]['status']} in {results[-1]['seconds']} s {results[-1]['why']}", flush=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "result.json").write_text(json.dumps({"machine": about, "parts": results}, indent=1) + "\n")
    (given.folder / "table.md").write_text(table(about, results), encoding="utf-8")
    print(given.folder / "table.md")
    return int(any(result["status"] == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
