"""DropReport: which rows could not be used, by reason, with the first examples. Nothing is lost silently."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from swiftlite.utils.dist import is_main_process
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.logger import get_logger

_NUM_EXAMPLES = 3
_MAX_CHARS = 20_000


class RejectsFile:
    """The rows that could not be used, one JSON object a line: place, reason, detail, row. Made with the first one.

    path None: rows are counted in `report` only.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.report = DropReport()
        self._file: IO[str] | None = None
        if self.path is not None and is_main_process():
            self.path.unlink(missing_ok=True)

    def write(self, place: str, reason: str, detail: str, row: object) -> None:
        self.report.drop(reason, place, detail)
        if self.path is None or not is_main_process():
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        try:
            text = json.dumps(row, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):  # a row that holds itself, or has keys that JSON has not
            text, row = "", f"a {type(row).__name__} that JSON cannot hold"
        if len(text) > _MAX_CHARS:
            row = text[:_MAX_CHARS] + "..."
        line = {"place": place, "reason": reason, "detail": detail[:_MAX_CHARS], "row": row}
        out = json.dumps(line, ensure_ascii=False, default=str)
        self._file.write(out.encode("utf-8", "replace").decode("utf-8") + "\n")
        self._file.flush()


def printable(text: str) -> str:
    """What came out of a file, for one line of a log: no control characters, no halves of surrogate pairs."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[:_MAX_CHARS])


@dataclass
class DropReport:
    """total: rows looked at. reasons: dropped rows by reason. examples: reason -> the first places and details.

    log: (reason, place, detail) of every dropped row, where it is kept.
    """

    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    rejects: RejectsFile | None = None
    log: list[tuple[str, str, str]] | None = None

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    @property
    def kept(self) -> int:
        return self.total - self.dropped

    def drop(self, reason: str, place: str, detail: str = "", row: object = None) -> None:
        """Count a dropped row (already in `total`) under its reason."""
        detail = printable(detail)
        self.reasons[reason] += 1
        if self.log is not None:
            self.log.append((reason, place, detail[:200]))
        places = self.examples.setdefault(reason, [])
        if len(places) < _NUM_EXAMPLES:
            places.append(" ".join(part for part in (place, detail[:200]) if part))
        if self.rejects is not None:
            self.rejects.write(place, reason, detail, row)

    def summary(self) -> str:
        """One line: counts, then each reason with its first examples."""
        if not self.reasons:
            return f"all {self.total} rows used"
        parts = (
            f"{count}x {reason} ({'; '.join(self.examples[reason])})" for reason, count in self.reasons.most_common()
        )
        return f"{self.dropped} of {self.total} rows dropped: {', '.join(parts)}"

    def table(self) -> str:
        """One line per reason: count, share, reason, first example."""
        lines = [f"{self.kept} of {self.total} rows used"]
        for reason, count in self.reasons.most_common():
            share = 100 * count / max(self.total, 1)
            lines.append(f"{count:>8}  {share:5.1f} %  {reason}, first: {self.examples[reason][0]}")
        return "\n".join(lines)

    def check(self, max_drop_ratio: float, what: str) -> None:
        """Log what was dropped. Raises DatasetError if more than `max_drop_ratio` of the rows were, or all of them."""
        if not self.reasons:
            return
        where = f"; all of them: {self.rejects.path}" if self.rejects is not None and self.rejects.path else ""
        if self.dropped > max_drop_ratio * self.total:
            raise DatasetError(
                f"{what}: {self.summary()}; more than --max_drop_ratio {max_drop_ratio:g}: fix the rows or raise it"
                f"{where}"
            )
        if not self.kept:
            raise DatasetError(f"{what}: {self.summary()}; no row is left{where}")
        get_logger().warning("%s: %s%s", what, self.summary(), where)
