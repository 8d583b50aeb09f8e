"""The report as a reader sees it, in a browser."""

import io
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from test_report import evaluation_line, job, rollout, step_line, write_metrics, write_samples

from browser import opened
from distill_api.job import DistillationJob
from distill_workers.reporting.curves import COLOURS
from distill_workers.reporting.report import write_report

__all__ = ["job"]


def share(picture: bytes, colour: str) -> float:
    """Of the pixels that have the colour, as far as the eye can tell."""
    pixels = matplotlib.image.imread(io.BytesIO(picture))[:, :, :3]
    return float((np.abs(pixels - np.array(matplotlib.colors.to_rgb(colour))).max(axis=2) < 0.03).mean())


@pytest.mark.timeout(120)
def test_a_browser_draws_the_plots_and_has_nothing_to_complain_of(tmp_path: Path, job: DistillationJob) -> None:
    lines = [evaluation_line(0, 0.25, 2.0, 1.0), *(step_line(n) for n in range(1, 21)), evaluation_line(20, 0.875, 0.5)]
    write_metrics(tmp_path, lines)
    write_samples(tmp_path, [rollout(1, ["seven", " and", " five"], [3.0, 0.0, -3.0])])
    write_report(tmp_path, job)
    seen = opened(tmp_path / "report.html")
    assert seen.console == []
    assert seen.dom.count("<svg") == 1 and seen.dom.count('id="axes_') >= 4
    # Areas of the stages, a curve of each plot, and a token of each colour.
    for colour in COLOURS[:4]:
        assert share(seen.picture, colour) > 0.0005, colour
    for red_or_blue in ("#e36353", "#537be3"):
        assert share(seen.picture, red_or_blue) > 0.00005, red_or_blue


@pytest.mark.timeout(150)
def test_an_error_of_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<script>throw new Error("not drawn")</script><p>text</p>')
    assert "not drawn" in opened(page).console[0]
