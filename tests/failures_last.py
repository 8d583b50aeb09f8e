"""A pytest plugin: what failed is told again, in a few lines, after everything else that a layer prints.

The processes of a layer end at different times and print warnings and durations after their failures; whoever reads
only the end of a log, as a CI page shows it, would not learn which test failed. dev/test.sh names a folder in
DISTILL_TEST_FAILURES, each process leaves a file there, and dev/test.sh prints them last.
"""

import os
import re
from pathlib import Path

import pytest

VARIABLE = "DISTILL_TEST_FAILURES"
WIDTH = 320
"""The most characters of one failure: an assertion may quote a whole log."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _tell(report.nodeid, report.when, report.longrepr)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _tell(report.nodeid, "collect", report.longrepr)


def _tell(test: str, phase: str | None, failure: object) -> None:
    folder = os.environ.get(VARIABLE)
    if folder is None:
        return
    crash = getattr(failure, "reprcrash", None)
    said = f"{Path(crash.path).name}:{crash.lineno}: {crash.message}" if crash else str(failure)[-WIDTH:]
    text = re.sub(r"\s+", " ", said).strip()
    with open(Path(folder) / str(os.getpid()), "a", encoding="utf-8") as file:
        file.write(f"{test} ({phase}): {text[:WIDTH]}\n")
