"""One logger for the package. Library code never prints; commands print only their results."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO

from swiftlite.utils.errors import UsageError
from swiftlite.utils.secrets import redact
from swiftlite.utils.text import printable


class _RankZeroFilter(logging.Filter):
    """Let warnings of every rank through, the rest only from rank 0."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or os.environ.get("RANK", "0") == "0"


class _Formatter(logging.Formatter):
    """Without access tokens, whoever put them into a message; names from files do nothing to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Write to whatever `sys.stderr` is now, so that progress bars and test captures see it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def get_logger() -> logging.Logger:
    """Return the `swiftlite` logger; the level is `SWIFTLITE_LOG_LEVEL` (default INFO). Raises: UsageError for another."""
    logger = logging.getLogger("swiftlite")
    if not logger.handlers:
        handler = _StderrHandler()
        handler.setFormatter(_Formatter("[%(levelname)s] %(message)s"))
        handler.addFilter(_RankZeroFilter())
        level = os.environ.get("SWIFTLITE_LOG_LEVEL") or "INFO"
        if level.upper() not in _LEVELS:
            raise UsageError(f"SWIFTLITE_LOG_LEVEL is {level}: must be one of {', '.join(_LEVELS)}")
        logger.setLevel(level.upper())
        logger.addHandler(handler)
        logger.propagate = False
    return logger


def log_next(*words: object) -> None:
    """`next: COMMAND`, ready to be typed."""
    import shlex

    get_logger().info("next: %s", shlex.join(map(str, words)))


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning the first time this text is seen in the process."""
    if message not in _warned:
        _warned.add(message)
        get_logger().warning(message)
