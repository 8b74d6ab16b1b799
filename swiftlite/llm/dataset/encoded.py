"""EncodedDataset: rows as token ids and labels, encoded once, kept in a compact form."""

from __future__ import annotations

import multiprocessing
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.store import TokenStore, type_of
from swiftlite.llm.template.base import IGNORE_INDEX, MaxLengthError, Template
from swiftlite.utils.errors import DatasetError, TemplateError

_BATCH = 256

Sample = dict[str, Any]


class EncodedDataset:
    """A map-style data set: `len`, `[i]` -> what `template.encode` returns. Same rows, same order, same result.

    Args:
        rows: standard rows (see load_dataset). Rows that cannot be encoded are left out and counted in `report`.
        max_drop_ratio: DatasetError if more of the rows are left out, or all.
        name: what messages call the data set. num_proc: processes that encode; the result is the same for any number.
        rejects: where rows that are left out are written.
    Attributes:
        report: DropReport. lengths: tokens per kept sample. row_indices: index in `rows` of each sample.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        template: Template,
        *,
        max_drop_ratio: float = 0.05,
        name: str = "dataset",
        num_proc: int = 1,
        rejects: RejectsFile | None = None,
    ) -> None:
        if not rows:
            raise DatasetError(f"{name}: holds no rows; give a file with at least one")
        self.report = DropReport(rejects=rejects, log=[])
        self.row_indices: list[int] = []
        self.store = TokenStore()
        # A few rows are encoded faster than processes start.
        with RowEncoder(template, num_proc if len(rows) > 2 * _BATCH else 1) as encode:
            for i, encoded in enumerate(encode(rows)):
                for sample in samples_of(encoded, self.report, f"row {i}", rows[i]):
                    self.row_indices.append(i)
                    self.store.append(sample)
        self.lengths = self.store.lengths()
        self.report.check(max_drop_ratio, name)

    @classmethod
    def load(cls, directory: Path) -> EncodedDataset:
        """One that `save` wrote, mapped into memory. Raises: DatasetError."""
        dataset = cls.__new__(cls)
        dataset.store = TokenStore.load(directory)
        dataset.lengths = dataset.store.lengths()
        dataset.row_indices = list(range(len(dataset.store)))
        dataset.report = DropReport(total=len(dataset.store))
        return dataset

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.store.save(directory)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        return self.store[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.store)


def samples_of(encoded: Any, report: DropReport, place: str, row: Any) -> list[Sample]:
    """The samples of one row's encoding; a row without any is counted with its reason."""
    report.total += 1
    if isinstance(encoded, MaxLengthError):
        report.drop("longer than --max_length", place, f"{encoded.length} tokens", row)
        return []
    if isinstance(encoded, TemplateError):
        report.drop("cannot be encoded", place, str(encoded), row)
        return []
    # The first token is nobody's prediction.
    parts = encoded if isinstance(encoded, list) else [encoded]
    kept = [part for part in parts if part["labels"][1:].count(IGNORE_INDEX) < len(part["labels"]) - 1]
    if not kept:
        report.drop("no assistant text with a loss", place, "", row)
    return kept


class RowEncoder:
    """Encodes rows with a template, in several processes if asked for; the result is the same for any number.

    The processes are made here, so make it before threads and devices are in use. `with` ends them.
    """

    def __init__(self, template: Template, num_proc: int = 1) -> None:
        self.template = template
        self._pool: Any = None
        if num_proc > 1:
            # Children of a fork have the template already: nothing but rows and numbers travels.
            self._pool = multiprocessing.get_context("fork").Pool(num_proc, _start_child, (template,))

    def __enter__(self) -> RowEncoder:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Iterator[Any]:
        """`template.encode_batch` of all rows, in order."""
        if self._pool is None:
            for batch in _batches(rows):
                yield from self.template.encode_batch(batch)
        else:
            for encoded in self._pool.imap(_encode_batch, _batches(rows)):
                yield from encoded


_template: Template | None = None


def _start_child(template: Template) -> None:
    global _template
    _template = template
    # The processes are the threads: a tokenizer that makes its own ones besides would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _encode_batch(rows: list[dict[str, Any]]) -> list[Any]:
    """In a child: numbers travel back as arrays, not as objects."""
    assert _template is not None
    return [
        [_flat(part) for part in encoded] if isinstance(encoded, list) else _flat(encoded)
        for encoded in _template.encode_batch(rows)
    ]


def _flat(encoded: Any) -> Any:
    if not isinstance(encoded, dict):
        return encoded
    return {name: array(code, value) if (code := type_of(name)) else value for name, value in encoded.items()}


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
