"""The identity of a run: what shapes its curve, and what two jobs differ in.

Where data and models lie does not belong to it. Data is compared by its content, which the checkpoint has
(data/identity.py); a model by its weight files where they are here, else by the last part of its path.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_api.job import DistillationJob
from distill_api.spec.job_spec import Spec

FREE_OF_TEACHER = {
    "replicas": True,
    "template": True,
    "max_concurrent_requests": True,
    "request_timeout_seconds": True,
    "max_disagreement": True,
    "endpoint": {"key_secret", "vocabulary_size"},
    "model": True,
    "tokenizer": True,  # what it makes of the prompts is part of the data's content
}
FREE_FIELDS: dict[str, Any] = {
    "suspend": True,
    "managed_by": True,
    "scheduling": True,
    "backoff_limit": True,
    "active_deadline_seconds": True,
    "pre_running_deadline_seconds": True,
    "stall_timeout_seconds": True,
    "stall_policy": True,
    "ttl_seconds_after_finished": True,
    "schedule": True,
    "guards": True,
    "output": True,
    "pod_template": True,
    "tracking": True,
    "student": {"model"},
    "teacher": FREE_OF_TEACHER,
    "teachers": {"__all__": FREE_OF_TEACHER},
    "objective": {"teacher_logprobs"},
    "data": {"prompts": True, "sources": {"__all__": {"prompts"}}},
    "evaluation": {"__all__": {"prompts"}},
    "rollout": {
        "replicas": True,
        "template": True,
        "head_template": True,
        "max_concurrent_requests": True,
        "environment": {"tools": True, "timeout_seconds": True, "verifiers": {"python"}},
    },
    "trainer": {
        "nodes": True,
        "gpus_per_node": True,
        "parallelism": True,
        "recompute": True,
        "max_tokens_per_micro_batch": True,
        "weight_sync": True,
        "optimizer": {"distributed"},
        "template": True,
    },
}
"""What may differ between two runs of one curve: not what is learnt, but for how long, where and by how many."""
WEIGHTS = ("*.safetensors", "*.bin")
EDGE_BYTES = 1 << 16
"""Bytes of a weight file that are compared at each end; the first hold the names and shapes of its tensors."""
SHOWN = 4
"""Differences that a sentence names."""


def shape(job: DistillationJob) -> dict[str, Any]:
    """Return the fields that shape the curve, by their paths in the spec, but for models."""
    spec = job.spec
    found = dict(_flat(spec.model_dump(mode="json", by_alias=True, exclude=FREE_FIELDS, exclude_none=True)))
    if any(phase.until_flat is not None for phase in spec.phases):  # then it says when a phase ends
        found["schedule.evaluateEverySteps"] = spec.schedule.evaluate_every_steps
    return found


def models(spec: Spec) -> dict[str, str]:
    """Return the models of a job, by the paths of their fields in the spec."""
    found = {"student.model": spec.student.model}
    return found | {f"{t.path.removeprefix('spec.')}.model": t.model for t in spec.all_teachers if t.model is not None}


def weights_of(folder: str) -> str | None:
    """Return a hash of the ends and sizes of a model's weight files; None where they are not on this machine."""
    found = hashlib.sha256()
    files = sorted(f for pattern in WEIGHTS for f in Path(folder).expanduser().glob(pattern))
    if not files:
        return None
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            found.update(stream.read(EDGE_BYTES))
            stream.seek(max(size - EDGE_BYTES, 0))
            found.update(stream.read(EDGE_BYTES))
    return found.hexdigest()[:16]


def fingerprint(job: DistillationJob) -> str:
    """Return a hash that is equal for two jobs that would draw the same curve from the same data."""
    names = {field: Path(model).name for field, model in models(job.spec).items()}
    return hashlib.sha256(json.dumps([shape(job), names], sort_keys=True).encode()).hexdigest()[:16]


def differences(
    there: DistillationJob, here: DistillationJob, weights_there: Mapping[str, str], weights_here: Mapping[str, str]
) -> list[str]:
    """Return what makes two jobs different runs: each field with both values. `weights_…` are by the fields' paths."""
    old, new = shape(there), shape(here)
    absent = "nothing"
    found = [
        f"spec.{path} is {_short(old.get(path, absent))} there and {_short(new.get(path, absent))} here"
        for path in sorted(old.keys() | new.keys())
        if old.get(path, absent) != new.get(path, absent)
    ]
    models_there, models_here = models(there.spec), models(here.spec)
    for path in models_there.keys() & models_here.keys():
        before, after = models_there[path], models_here[path]
        if path in weights_there and path in weights_here:
            if weights_there[path] != weights_here[path]:
                found.append(f"spec.{path}: the weights in {after} are not those that the run began with in {before}")
        elif Path(before).name != Path(after).name:
            found.append(f"spec.{path} is {before} there and {after} here")
    for path in models_there.keys() ^ models_here.keys():
        found.append(f"spec.{path} is {models_there.get(path, absent)} there and {models_here.get(path, absent)} here")
    return found


def sentence(found: list[str]) -> str:
    """Return differences as one part of a sentence."""
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(found[:SHOWN]) + more


def _flat(value: Any, path: str = "") -> Any:
    """Yield path and value of everything in a tree that is no mapping."""
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{path}.{key}" if path else key)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
