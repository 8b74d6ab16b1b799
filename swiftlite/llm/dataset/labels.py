"""Rows that say of each answer whether it is desirable, for KTO."""

from __future__ import annotations

from collections.abc import Sequence

from swiftlite.llm.dataset.encoded import place_of
from swiftlite.llm.dataset.loader import PlacedRow
from swiftlite.llm.dataset.report import DropReport
from swiftlite.utils.types import Json

LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}


def labelled(rows: Sequence[Json], report: DropReport) -> list[Json]:
    """The rows that say whether their answer is desirable, `label` being true or false in them.

    A row with a rejected answer is two: all desirable answers come first, as trl divides such data.
    """
    first: list[Json] = []
    rest: list[Json] = []
    for index, row in enumerate(rows):
        report.total += 1
        place = place_of(row, index)
        common = {"tools": row["tools"]} if "tools" in row else {}
        sides: list[tuple[list[Json], bool]]
        if row.get("rejected_messages"):
            sides = [(row["messages"], True), (row["rejected_messages"], False)]
        else:
            label = LABELS.get(str(row.get("label")).lower())
            if label is None:
                seen = f"label is {row['label']!r}" if "label" in row else ""
                report.drop("no label true or false", place, seen or "give a column `label`", row)
                continue
            sides = [(row["messages"], label)]
        if any(m.get(name, 1) not in (0, 1) for said, _ in sides for m in said for name in ("loss", "loss_scale")):
            report.drop("a loss weight other than 0 and 1", place, "preference losses compare whole answers", row)
            continue
        for messages, label in sides:
            new = PlacedRow({"messages": messages, "label": label, **common}, place)
            (first if label and len(sides) > 1 else rest).append(new)
    return first + rest
