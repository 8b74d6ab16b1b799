"""DropReport: which rows could not be used, by reason, with the first examples. Nothing is lost silently."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from swiftlite.utils.errors import DatasetError
from swiftlite.utils.logger import get_logger

_NUM_EXAMPLES = 3


@dataclass
class DropReport:
    """total: rows looked at. reasons: dropped rows by reason. examples: reason -> the first places and details."""

    total: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        return sum(self.reasons.values())

    @property
    def kept(self) -> int:
        return self.total - self.dropped

    def drop(self, reason: str, example: str) -> None:
        """Count a dropped row (already in `total`) under its reason."""
        self.reasons[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _NUM_EXAMPLES:
            places.append(example)

    def summary(self) -> str:
        """One line: counts, then each reason with its first examples."""
        if not self.reasons:
            return f"all {self.total} rows used"
        parts = (
            f"{count}x {reason} ({'; '.join(self.examples[reason])})" for reason, count in self.reasons.most_common()
        )
        return f"{self.dropped} of {self.total} rows dropped: {', '.join(parts)}"

    def check(self, max_drop_ratio: float, what: str) -> None:
        """Log what was dropped. Raises DatasetError if more than `max_drop_ratio` of the rows were, or all of them."""
        if not self.reasons:
            return
        if self.dropped > max_drop_ratio * self.total:
            raise DatasetError(
                f"{what}: {self.summary()}; more than --max_drop_ratio {max_drop_ratio:g}: mend the rows or raise it"
            )
        if not self.kept:
            raise DatasetError(f"{what}: {self.summary()}; no row is left")
        get_logger().warning("%s: %s", what, self.summary())
