"""Where SGLang is installed: whole steps of `distill run`, with an engine and a teacher on the same device."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from measured import TINY, Rows
from models import LARGEST, make_model

STEPS = 2
NEEDED = ("sglang", "ray", "aiohttp")


def missing() -> str | None:
    """Return why this part cannot run here."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"needs SGLang and Ray; not installed: {', '.join(absent)}" if absent else None


def measure(rows: Rows, work: Path) -> None:
    from distill_api.base import API_VERSION, KIND
    from distill_api.job import parse_job
    from distill_workers.local.run import LocalRun
    from distill_workers.run.preflight.student import TOLERANCE_NATS

    shape = LARGEST | {"vocab_size": max(512, LARGEST["vocab_size"])}
    student, teacher = (make_model(work / name, shape, seed=seed) for seed, name in enumerate(("student", "teacher")))
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"what is {n} plus {n + 1}?"}) + "\n" for n in range(32)))
    for folder in (student, teacher):
        write_tokenizer(folder)
    spec: dict[str, Any] = {
        "accelerator": "none" if TINY else "nvidia.com/gpu",
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "data": {"prompts": {"path": str(prompts), "promptField": "prompt", "applyChatTemplate": False}},
        "rollout": {"promptsPerStep": 4, "samplesPerPrompt": 2, "maxPromptTokens": 64, "maxResponseTokens": 128},
        "trainer": {"maxTokensPerMicroBatch": 1024},
        "schedule": {"steps": STEPS},
        "output": {"path": str(work)},
    }
    job = parse_job({"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": "first"}, "spec": spec})
    run = LocalRun(job)
    code = run.run(lambda report: None, lambda text: None)
    report = run.exit_report()
    assert code == 0, f"ended with {code}: {report.message if report else log_of(run.folder.root)}"
    lines = [json.loads(line) for line in (run.folder.root / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    rows.add("steps done", len(steps), "", at_least=STEPS, also_tiny=True)
    for line in steps:
        gap, tolerance = line["trainer_engine_gap"], TOLERANCE_NATS[job.spec.dtype]
        rows.add(f"step {line['step']}: train-rollout mismatch", gap, "nats", at_most=tolerance, also_tiny=True)
        for stage, took in line.get("stages", {}).items():
            rows.add(f"step {line['step']}: {stage}", took, "s")


def log_of(folder: Path) -> str:
    """Return the end of the trainer's log."""
    path = folder / "logs" / "trainer.log"
    return path.read_text(errors="replace")[-3000:] if path.exists() else "it has no log"


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer into a model's folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.save_pretrained(folder)
