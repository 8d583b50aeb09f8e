"""Writes the Grafana dashboards: `python dev/dashboards/generate.py charts/distillation-operator/files/dashboards`.

They are code, by Grafana's own builders; the JSON beside the chart is made from it, and a test compares the two.
"""

import json
import sys
from pathlib import Path

import fleet_board
import job_board
import operator_board
from grafana_foundation_sdk.cog.encoder import JSONEncoder

BOARDS = (job_board.BOARD, fleet_board.BOARD, operator_board.BOARD)


def texts() -> dict[str, str]:
    """JSON by name of file."""
    return {
        f"{board.uid}.json": json.dumps(board.build().build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for board in BOARDS
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for name, text in texts().items():
        (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
