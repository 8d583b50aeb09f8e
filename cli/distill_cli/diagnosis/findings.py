"""What a check of `distill doctor` found: its level, a message, and a remedy."""

from dataclasses import dataclass
from enum import StrEnum

INSTALL_CHART = "install the chart (make install, or helm upgrade --install)"
"""The remedy of several checks."""


class Level(StrEnum):
    """How bad a finding is; one that is `fail` keeps jobs from running."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """What a check found; `remedy` is empty where nothing is to be done."""

    check: str
    level: Level
    message: str
    remedy: str = ""
