"""Whether the environment of a process holds variables that Kubernetes made of Services.

A Service called `ray` gives each pod of its namespace RAY_PORT=tcp://10.0.0.1:6379, which the program of that name
takes for its own setting (miles' recipe). Pods that the operator makes have enableServiceLinks: false.
"""

import re
from collections.abc import Mapping

from distill_workers.failures import PreflightFailed

OURS = re.compile(r"(SGLANG|RAY|NCCL|MASTER|DISTILL|HF|TORCH|CUDA|OMP|WANDB)_")
"""How the names of variables begin that the processes of a job read."""
OF_SERVICE = re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+:[0-9]+")


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise PreflightFailed for a variable of a Service that has the name of a setting. Costs nothing."""
    found = sorted(
        name for name, value in environment.items() if OURS.match(name) and OF_SERVICE.fullmatch(value.strip())
    )
    if found:
        raise PreflightFailed(
            f"ServiceLinks: {found[0]} is {environment[found[0]]}, which Kubernetes made of a Service of this "
            "namespace, and the program that reads a variable of this name takes it for its setting; set "
            "enableServiceLinks: false in the pod's template, or give the Service another name"
        )
