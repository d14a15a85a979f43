"""The daemon's log: one line per record on standard error, as text or JSON; its level can change while it runs."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

_TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_CHATTY: Final = ("httpx", "httpcore", "asyncio", "grpc")  # libraries whose debug lines name whole URLs, with signed queries, or say little


class JsonFormatter(logging.Formatter):
    """One object per line: time (RFC 3339, UTC), level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        at = self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        line = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def start(level: str, style: str) -> None:
    """Write the log from now on. level: of config.LOG_LEVELS; style: "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = JsonFormatter() if style == "json" else logging.Formatter(_TEXT)
    if style == "json":
        formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler])
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    set_level(level)


def set_level(level: str) -> None:
    """Say from now on what is at least this important."""
    logging.getLogger().setLevel(level.upper())
