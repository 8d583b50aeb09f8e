"""Many rows of data: a million prompts take bounded memory and time, and their reading shows how far it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_tokenizer

READ = """
import json, logging, resource, sys, time
from transformers import AutoTokenizer
from distill_api.spec.job_spec import Prompts
from distill_workers.data import prompts

logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
prompts.PROGRESS_SECONDS = float(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
prompts.load_prompts(Prompts(path=sys.argv[2]), tokenizer, 512, 64)
before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
read, _ = prompts.load_prompts(Prompts(path=sys.argv[2], answerField="answer"), tokenizer, 512, None)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"rows": len(read), "bytes": grown * 1024, "seconds": time.process_time() - begin}))
"""
ROW_BYTES = 3000
"""Memory of one prompt of about a hundred tokens: its text, its ids (8 bytes each), its answer and three other
fields."""
ROW_SECONDS = 1e-3
"""Of one processor, for one such prompt; 0.3 to 0.4 ms were measured on two busy cores."""
QUESTION = (
    "A train leaves the station at {0} km/h and another follows it {1} minutes later at {2} km/h. When do they meet?"
)


def write_rows(path: Path, count: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for n in range(count):
            row = {"prompt": QUESTION.format(n, n % 60, n + 7), "answer": str(n), "level": n % 5, "source": "trains"}
            file.write(json.dumps({**row, "id": f"row-{n}"}) + "\n")


@pytest.mark.parametrize(
    ("rows", "progress_seconds"),
    [(20_000, 0.2), pytest.param(1_000_000, 10.0, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])],
)
def test_many_rows_are_read_in_bounded_memory_and_time_with_progress(
    rows: int, progress_seconds: float, tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path / "rows.jsonl", rows)
    arguments = [str(tmp_path / "tokenizer"), str(tmp_path / "rows.jsonl"), str(progress_seconds)]
    done = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"\n{rows:,} rows: {found['seconds']:.0f} s of CPU, {found['bytes'] / 1e6:,.0f} MB")
    assert found["rows"] == rows
    assert found["bytes"] < rows * ROW_BYTES
    assert found["seconds"] < rows * ROW_SECONDS
    assert "prompts read, the newest at " in done.stderr
