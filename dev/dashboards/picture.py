"""Draws a dashboard from the answers of a Prometheus, so that a reader of the docs sees what it looks like.

    workers/.venv/bin/python dev/dashboards/picture.py URL BOARD NAMESPACE JOB MINUTES FILE

BOARD is job, fleet or operator; NAMESPACE and JOB are regular expressions where its variables take several. Panels
without an answer are left out, as their needs (a GPU, an exporter, a fault) are not met.
"""

import io
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

BOARDS = Path(__file__).parents[2] / "charts/distillation-operator/files/dashboards"
COLUMNS = 4
MOST_NAMED = 8
"""Lines of a panel; the names of more would hide them."""
Series = list[tuple[str, list[float], list[float]]]


def ask(url: str, path: str, **parameters: Any) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
        return json.load(answer)["data"]["result"]


def series(url: str, panel: dict[str, Any], values: dict[str, str], begin: float, end: float) -> Series:
    """Of all queries of a panel: legend, seconds since the beginning, values."""
    found: Series = []
    for target in panel["targets"]:
        expression = target["expr"]
        for variable, value in values.items():
            expression = expression.replace(variable, value)
        step = max(1.0, (end - begin) / 300)
        for one in ask(url, "query_range", query=expression, start=begin, end=end, step=step):
            legend = target.get("legendFormat", "")
            for label, value in one["metric"].items():
                legend = re.sub(r"\{\{" + label + r"\}\}", value, legend)
            points = [(float(at) - begin, float(value)) for at, value in one["values"] if value != "NaN"]
            if points:
                found.append((legend, [p[0] for p in points], [p[1] for p in points]))
    return found


def draw(axes: Any, panel: dict[str, Any], lines: Series) -> None:
    stacked = "stacking" in panel["fieldConfig"]["defaults"].get("custom", {})
    if stacked:
        at = sorted({x for _, xs, _ in lines for x in xs})
        rows = [[dict(zip(xs, ys, strict=True)).get(x, 0.0) for x in at] for _, xs, ys in lines]
        axes.stackplot(at, rows, labels=[name for name, *_ in lines], alpha=0.75)
    else:
        for name, xs, ys in lines:
            axes.plot(xs, ys, label=name, linewidth=1.2)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_title(panel["title"] + ("" if unit == "short" else f" [{unit}]"), fontsize=9, loc="left", weight="bold")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if any(name for name, *_ in lines) and len(lines) <= MOST_NAMED:
        axes.legend(fontsize=6, loc="best", framealpha=0.6)


def main(url: str, name: str, namespace: str, job: str, minutes: float, out: Path) -> None:
    end = time.time()
    begin = end - 60 * minutes
    values = {"$namespace": namespace, "$job": job, "$__range": f"{max(1, round(minutes))}m"}
    board = json.loads((BOARDS / f"distillation-{name}.json").read_text())
    shown = [p for p in board["panels"] if p["type"] in ("stat", "timeseries")]
    answers = [(panel, series(url, panel, values, begin, end)) for panel in shown]
    stats = [(panel, lines) for panel, lines in answers if panel["type"] == "stat" and lines]
    drawn = [(panel, lines) for panel, lines in answers if panel["type"] == "timeseries" and lines]
    if not drawn:
        sys.exit(f"{url} knows nothing of {namespace}/{job}: no panel has an answer in the last {minutes:g} minutes")
    rows = -(-len(drawn) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(16, 2.3 * rows + 0.8), squeeze=False)
    for axes in grid.flat[len(drawn) :]:
        axes.axis("off")
    for axes, (panel, lines) in zip(grid.flat, drawn, strict=False):
        draw(axes, panel, lines)
    head = "      ".join(f"{panel['title']}: {lines[0][2][-1]:.3g}" for panel, lines in stats)
    of = f": {namespace}/{job}" if name == "job" else ""
    figure.suptitle(f"{board['title']}{of}\n{head}", fontsize=11, x=0.01, ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.985))
    drawing = io.BytesIO()
    figure.savefig(drawing, dpi=62)
    drawing.seek(0)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Few colours: a fifth of the bytes.
    Image.open(drawing).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    address, of_board, of_namespace, of_job, length, file = sys.argv[1:]
    main(address, of_board, of_namespace, of_job, float(length), Path(file))
