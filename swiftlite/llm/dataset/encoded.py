"""EncodedDataset: rows as token ids and labels, encoded once, kept in a compact form."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from swiftlite.llm.dataset.report import DropReport
from swiftlite.llm.template.base import IGNORE_INDEX, MaxLengthError, Template
from swiftlite.utils.errors import DatasetError, TemplateError

_BATCH = 256
# Lists that are as long as the tokens: array type code. Ids fit 4 bytes.
_TOKEN_LISTS = {"input_ids": "i", "labels": "i", "loss_scale": "f"}


class EncodedDataset:
    """A map-style data set: `len`, `[i]` -> what `template.encode` returns. Same rows, same order, same result.

    Args:
        rows: standard rows (see load_dataset). Rows that cannot be encoded are left out and counted in `report`.
        max_drop_ratio: DatasetError if more of the rows are left out, or all.
        name: what messages call the data set.
    Attributes:
        report: DropReport. lengths: tokens per kept row. row_indices: index in `rows` of each kept row.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], template: Template, *, max_drop_ratio: float = 0.05, name: str = "dataset"
    ) -> None:
        if not rows:
            raise DatasetError(f"{name}: holds no rows; give a file with at least one")
        self.report = DropReport(total=len(rows))
        self.row_indices: list[int] = []
        self.lengths: list[int] = []
        self._rows: list[dict[str, Any]] = []
        for start in range(0, len(rows), _BATCH):
            chunk = rows[start : start + _BATCH]
            for i, encoded in enumerate(template.encode_batch(chunk), start=start):
                if isinstance(encoded, TemplateError):
                    self._drop(i, encoded)
                elif all(label == IGNORE_INDEX for label in encoded["labels"][1:]):
                    # The first token is nobody's prediction.
                    self.report.drop("no assistant text with a loss", f"row {i}")
                else:
                    self.row_indices.append(i)
                    self.lengths.append(encoded["length"])
                    self._rows.append(_packed(encoded))
        self.report.check(max_drop_ratio, name)

    def _drop(self, index: int, error: TemplateError) -> None:
        if isinstance(error, MaxLengthError):
            self.report.drop("longer than --max_length", f"row {index} {error.length} tokens")
        else:
            self.report.drop("cannot be encoded", f"row {index}: {error}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value.tolist() if isinstance(value, array) else value for key, value in self._rows[index].items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))


def _packed(encoded: dict[str, Any]) -> dict[str, Any]:
    """Token lists as arrays: 4 bytes a number instead of an object each."""
    return {key: array(_TOKEN_LISTS[key], value) if key in _TOKEN_LISTS else value for key, value in encoded.items()}
