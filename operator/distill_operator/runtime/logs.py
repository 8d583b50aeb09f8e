"""Log lines as JSON for machines, or as text for people."""

import json
import logging
import re
import sys
from datetime import UTC, datetime

from distill_operator.settings import Settings


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def is_worth_saying(record: logging.LogRecord) -> bool:
    """Return False for most of what kopf says of a request that it tries again and again for as long as it fails."""
    found = re.match(r"Request attempt #(\d+)\b.* will retry", record.getMessage())
    return found is None or int(found[1]).bit_count() == 1


def configure(settings: Settings) -> None:
    """Send all log lines to the standard error in the format of the settings."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    handler.addFilter(is_worth_saying)
    # kopf logs every event that it passes on.
    logging.getLogger("kopf").setLevel(logging.WARNING)
