"""How long a checkpoint keeps the training waiting: written at once, and copied and written while training goes on.

    python bench/checkpoint_stall.py [--rounds 5]

A random Llama of 134 million parameters in fp32 on one rank, after one step, so that it has moments: 1.6 GB a
checkpoint. `waiting` is what the loop spends before it may go on: the copy to host memory, or the write with its fsync;
`written` until it is published; `step` is a training step of 256 tokens without, and beside, the writing. Rounds are
interleaved; medians [min-max]. What must reach the disk is the same, so the wall clock is what counts here.
"""

import argparse
import asyncio
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hf_load import make_model, spread

from distill_api.spec.job_spec import Spec
from distill_workers.cpu import megatron_shim
from distill_workers.data.sample import Sample
from distill_workers.run_folder.checkpoints import Checkpoints

if TYPE_CHECKING:
    from distill_workers.megatron.student import MegatronStudent

RATE = 1e-6


def make_samples() -> list[Sample]:
    tokens = list(range(100, 132))
    return [
        Sample(
            prompt_index=i,
            index_in_group=0,
            prompt_ids=tokens,
            response_ids=tokens,
            engine_logprobs=[-10.0] * len(tokens),
            token_versions=[0] * len(tokens),
            truncated=False,
            teacher_logprobs=[-9.0] * len(tokens),
        )
        for i in range(4)
    ]


def train(student: "MegatronStudent", samples: list[Sample]) -> None:
    student.accumulate(samples)
    student.update(RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    megatron_shim.install()
    from distill_workers.megatron.student import MegatronStudent

    with tempfile.TemporaryDirectory(dir=Path.home()) as temporary:  # /tmp may be memory
        folder = Path(temporary)
        make_model(folder)
        spec = Spec.model_validate({
            "accelerator": "none", "student": {"model": str(folder)}, "teacher": {"model": str(folder)},
            "data": {"prompts": {"path": "/none"}}, "schedule": {"steps": 1, "keepLast": 1},
        })  # fmt: skip
        student = MegatronStudent(spec, folder)
        samples, seconds = make_samples(), defaultdict[str, list[float]](list)
        checkpoints = Checkpoints(folder / "checkpoints")
        train(student, samples)

        def timed(name: str, begin: float) -> None:
            seconds[name].append(time.monotonic() - begin)

        for step in range(2 * rounds):
            aside = checkpoints.aside(step)
            begin = time.monotonic()
            if step % 2:
                student.begin_save(aside)
                timed("copied: waiting", begin)
                training = time.monotonic()
                train(student, samples)
                timed("copied: step beside the writing", training)
                asyncio.run(student.writer.written())
                training = time.monotonic()
                student.finish_save()
                checkpoints.publish(aside, {"step": step}, spec.schedule)
                timed("copied: waiting to publish", training)
                timed("copied: written", begin)
            else:
                student.save(aside)
                checkpoints.publish(aside, {"step": step}, spec.schedule)
                timed("at once: waiting", begin)
                begin = time.monotonic()
                train(student, samples)
                timed("at once: step", begin)
        size = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*.safetensors"))
        shutil.rmtree(folder / "checkpoints")
    print(f"{size / 1e9:.2f} GB, {rounds} rounds\n\n| what | seconds |\n|---|---|")
    for name, values in sorted(seconds.items()):
        print(f"| {name} | {spread(values)} |")
    ratio = statistics.median(seconds["copied: waiting"]) / statistics.median(seconds["at once: waiting"])
    print(f"\nwaiting, copied / at once: {ratio:.3f}")


if __name__ == "__main__":
    main()
