"""The column `label` of rows that a model is to classify: what it may hold, and the tensor that losses take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from swiftlite.arguments.task import TaskArguments
from swiftlite.llm.dataset.preprocess import Row, RowError, plain_label
from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import short
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

Label = int | float | list[int] | list[float]
_TRIED = 100  # rows among which the first label is looked for


@dataclass(frozen=True)
class Labels:
    """How labels are read: a class 0 .. num_labels - 1, a list of such, or num_labels numbers."""

    problem_type: str
    num_labels: int

    @classmethod
    def of(cls, args: TaskArguments) -> Labels | None:
        """None where rows have no labels. Raises: UsageError where their number or kind is not settled."""
        if not args.reads_labels:
            return None
        if args.num_labels is None or args.problem_type is None:
            missing = "num_labels" if args.num_labels is None else "problem_type"
            raise UsageError(f"--task_type seq_cls: give --{missing}")
        return cls(args.problem_type, args.num_labels)

    def read(self, row: Row) -> Label:
        """The row's label as the loss takes it. Text that is JSON is taken for what it says, as cells of CSV need it.

        Raises: RowError for one that is missing, of a wrong kind or out of range.
        """
        if "label" not in row:
            raise RowError("no label", f"keys {', '.join(sorted(row))}; name the column with --columns")
        value = plain_label(row["label"])
        if self.problem_type == "regression":
            return self._numbers(value)
        if self.problem_type == "multi_label_classification":
            return sorted({self._class(item) for item in (value if isinstance(value, list) else [value])})
        return self._class(value)

    def _class(self, value: object) -> int:
        if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
            wanted = "a list of classes" if self.problem_type.startswith("multi") else "a class"
            raise RowError("label of a wrong kind", f"{short(ascii(value))}; must be {wanted}, whole numbers")
        if not 0 <= value < self.num_labels:
            raise RowError(
                "label out of range", f"{value}; --num_labels {self.num_labels} has 0 to {self.num_labels - 1}"
            )
        return int(value)

    def _numbers(self, value: object) -> Label:
        given = value if isinstance(value, list) else [value]
        values = [float(v) for v in given if isinstance(v, int | float) and math.isfinite(v)]
        if len(values) != len(given):
            raise RowError("label of a wrong kind", f"{short(ascii(value))}; must be a number, or a list of them")
        if len(values) != self.num_labels:
            raise RowError("label of a wrong kind", f"{len(values)} numbers; --num_labels is {self.num_labels}")
        return values if self.num_labels > 1 else values[0]

    def tensor(self, labels: Sequence[Label]) -> Tensor:
        """int64 [B] for one class each; else float32 [B, N]: 0 and 1 for any number of classes, or the numbers."""
        import torch

        if self.problem_type == "single_label_classification":
            return torch.tensor(labels, dtype=torch.int64)
        if self.problem_type == "regression":
            return torch.tensor(labels, dtype=torch.float32).view(len(labels), self.num_labels)
        found = torch.zeros(len(labels), self.num_labels)
        for row, classes in enumerate(labels):
            found[row, torch.as_tensor(classes, dtype=torch.int64)] = 1.0
        return found


def problem_of(num_labels: int, rows: Iterable[tuple[str, Row | RowError]]) -> str:
    """The kind of labels where nobody says it: one number, or what the first row has that has any.

    A list of whole numbers names classes, one of others is numbers to predict, as transformers and ms-swift take them.
    """
    if num_labels == 1:
        return "regression"
    for _, row in islice(rows, _TRIED):
        value = plain_label(row.get("label")) if not isinstance(row, RowError) else None
        if isinstance(value, list):
            whole = all(isinstance(item, int) for item in value)
            return "multi_label_classification" if whole else "regression"
        if value is not None:
            break
    return "single_label_classification"


def names_of(id2label: Mapping[int, object] | Mapping[str, object] | None, num_labels: int) -> list[str]:
    """Names of the classes, as a config.json has them; none where they are numbers (LABEL_0), or not of so many classes."""
    named = {int(number): str(name) for number, name in (id2label or {}).items()}
    plain = all(name == f"LABEL_{number}" for number, name in named.items())
    return (
        []
        if plain or num_labels == 1 or set(named) != set(range(num_labels))
        else [named[i] for i in range(num_labels)]
    )


def values_of(label: Label) -> Sequence[int | float]:
    """The classes or numbers of a label."""
    return label if isinstance(label, list) else [label]


def label_text(label: Label, names: Sequence[str] = ()) -> str:
    """`2 (refund)`, `0 (late), 3 (rude)`, `no class`, `0.5`: a label for people to read."""
    shown = [f"{v} ({names[int(v)]})" if isinstance(v, int) and names else f"{v:g}" for v in values_of(label)]
    return ", ".join(shown) or "no class"


def labels_of(sample: Json) -> list[Label]:
    """Of an encoded sample, or of those that a packed sequence joins."""
    found: list[Label] = sample["label"] if "sample_lengths" in sample else [sample["label"]]
    return found
