"""What the environment of roles with accelerators must hold, in pods and in `distill run` alike.

The two ends of a NCCL communicator, trainer and engines, must agree about the memory that they exchange. SGLang sets
NCCL_CUMEM_ENABLE and NCCL_NVLS_ENABLE to 0 for its servers where they are unset, and to 1 for some of its flags
(sglang.srt.entrypoints.engine._set_envs_and_config, 0.5.23); NCCL's own default is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill_api.spec.job_spec import Spec

NCCL_AGREED = {"NCCL_CUMEM_ENABLE": "0", "NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0"}
"""Of every role. Memory of the host by cuMem wants calls of NUMA that a restricted pod may not make."""
NCCL_LOG = {"NCCL_DEBUG": "WARN"}
ENGINE_FLAGS = {
    "--enable-symm-mem": ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"),
    "--enable-nccl-nvls": ("NCCL_NVLS_ENABLE",),
}
"""Flags of SGLang by which it sets variables to 1, whatever its environment says."""
EXPANDABLE_SEGMENTS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""Each micro-batch has another shape. A PYTORCH_CUDA_ALLOC_CONF, torch's older name, goes before it."""
ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""Megatron relies on the order of kernels that it gives, to communicate while it computes."""


def of_every_role(spec: Spec, user: Sequence[Mapping[str, str]] = ()) -> dict[str, str]:
    """Return the variables that all roles of a job share; empty for a job on CPUs.

    user: what the user sets for the trainer and for the engines, in that order. The first to set one of NCCL_AGREED
    sets it for all roles; a flag of the engines by which SGLang sets it goes before both.
    """
    if spec.on_cpu:
        return {}
    found = {**NCCL_AGREED, **NCCL_LOG}
    for environment in reversed(user):
        found |= {name: environment[name] for name in NCCL_AGREED if name in environment}
    for flag, names in ENGINE_FLAGS.items():
        if flag in spec.rollout.engine_args:
            found |= dict.fromkeys(names, "1")
    return found


def of_the_trainer(spec: Spec) -> dict[str, str]:
    """Return what the trainer's processes have besides; empty for a job on CPUs."""
    if spec.on_cpu:
        return {}
    return {**EXPANDABLE_SEGMENTS, **(ONE_CONNECTION if spec.trainer.parallelism.tensor > 1 else {})}
