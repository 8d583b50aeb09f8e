"""Bytes of a training step for each parameter, against docs/guides/sizing.md, and what recomputation saves."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from measured import DEVICE, GB, Rows, free, peak, seconds
from models import LARGEST, TINY, make_model, make_samples, make_spec, make_student

RESPONSE = 24 if TINY else 4000
SAMPLES = 2
STATIC_BYTES = 18
"""Of sizing.md: weight 2, gradient 4, main parameter 4, two moments 8."""


def measure(rows: Rows, work: Path) -> None:
    folder = make_model(work / "student", LARGEST)
    samples = make_samples(LARGEST["vocab_size"], SAMPLES, 16, RESPONSE)
    tokens = SAMPLES * RESPONSE
    with peak() as whole:
        student = make_student(make_spec(folder, "bfloat16", max_tokens=RESPONSE + 64))
        count = sum(p.numel() for p in student._model.parameters())
        with peak() as forward:
            student.accumulate(samples)
        step(student, samples)
    rows.add("parameters", count / 1e9, "1e9")
    rows.add("tensors held after a step", held(student) / count, "bytes/parameter", at_most=18.1, also_tiny=True)
    if DEVICE.type == "cuda":
        rows.add("memory held after a step", (whole.after - whole.before) / count, "bytes/parameter", at_most=18.6)
    student.accumulate(samples)
    with peak() as update:
        found = student.update(1e-6)
    rows.add("steps that were left out", found["skipped"], "", at_most=0.0, also_tiny=True)
    rows.add("update, over what is held", update.extra / count, "bytes/parameter", at_most=0.6)
    buffers = [b.grad_data for b in student._parallel_model.buffers]
    with peak() as finite:
        assert student._gradient_is_finite()
    rows.add("check that the gradient is finite", finite.extra / count, "bytes/parameter", at_most=0.1)
    if TINY:
        assert all(buffer.dtype == torch.float32 for buffer in buffers), "gradients are summed in fp32"
    else:
        kernels = [
            group.get("fused")
            for part in student._optimizer.chained_optimizers
            for group in part.optimizer.param_groups
        ]
        rows.add("groups of AdamW that are one kernel", sum(map(bool, kernels)) / len(kernels), "share", at_least=1.0)
    rows.add("activations, all layers recomputed", forward.extra / GB, "GB")
    rows.add("a step", tokens / seconds(partial(step, student, samples)), "tokens/s")
    del student, buffers
    free()
    plain = make_student(make_spec(folder, "bfloat16", max_tokens=RESPONSE + 64, recompute="none"))
    with peak() as kept:
        plain.accumulate(samples)
    rows.add("activations, none recomputed", kept.extra / GB, "GB")
    if kept.extra:
        rows.add("recomputed / kept", forward.extra / kept.extra, "ratio", at_most=0.6)


def step(student: Any, samples: Any) -> dict[str, float]:
    """One optimiser step."""
    student.accumulate(samples)
    found: dict[str, float] = student.update(1e-6)
    return found


def held(student: Any) -> int:
    """Return the bytes of the tensors that a trainer keeps from step to step: weights, gradients, main parameters and
    moments."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in student._model.parameters()}
    for buffer in student._parallel_model.buffers:
        found[buffer.grad_data.untyped_storage().data_ptr()] = buffer.grad_data.untyped_storage().nbytes()
    for part in student._optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                for tensor in (parameter, *part.optimizer.state[parameter].values()):
                    if isinstance(tensor, torch.Tensor) and tensor.ndim:
                        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())
