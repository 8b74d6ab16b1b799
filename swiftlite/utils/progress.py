"""Progress bars: redrawn in a terminal; elsewhere one line a minute, so that a log stays readable."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from swiftlite.utils.quiet import BAR_SECONDS


class _Lines:
    """A text file for tqdm: each state of the bar becomes a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(iterable: Iterable[object] | None = None, **options: object) -> Any:
    """tqdm with its own options; a bar that lasts less than a minute is not shown where there is no terminal."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(iterable, mininterval=0.5, dynamic_ncols=True, **options)
    every: float = BAR_SECONDS
    return tqdm(iterable, file=_Lines(), ncols=100, mininterval=every, maxinterval=every, delay=every, **options)  # type: ignore[call-overload]
