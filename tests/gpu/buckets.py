"""How fast the trainer's parameters become buckets of Hugging Face tensors, beside a copy of the same bytes."""

import itertools
from pathlib import Path

import torch
from measured import DEVICE, GB, Rows, seconds
from models import LARGEST, make_model, make_spec, make_student

from distill_workers.weight_sync.buckets import BUCKET_BYTES, Buffers, pack


def measure(rows: Rows, work: Path) -> None:
    student = make_student(make_spec(make_model(work / "student", LARGEST), "bfloat16"))
    buffers = Buffers(BUCKET_BYTES, DEVICE)
    sent: dict[str, int] = {}

    def assemble() -> None:
        turns = itertools.cycle(range(Buffers.COUNT))

        def acquire(size_bytes: int) -> tuple[int, torch.Tensor]:
            number = next(turns)
            return number, buffers.get(number, size_bytes)

        sent["bytes"] = sent["buckets"] = 0
        for bucket in pack(student.hf_tensors(), BUCKET_BYTES, acquire):
            sent["bytes"] += len(bucket.flat)
            sent["buckets"] += 1

    assembled = seconds(assemble)
    source = torch.empty(sent["bytes"], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    rows.add("weights", sent["bytes"] / GB, f"GB in {sent['buckets']} buckets")
    rows.add("assembly of buckets", sent["bytes"] / GB / assembled, "GB/s")
    rows.add("a copy on the device", sent["bytes"] / GB / copied, "GB/s")
    rows.add("assembly / copy", copied / assembled, "ratio of GB/s", at_least=0.2)
