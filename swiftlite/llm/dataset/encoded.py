"""EncodedDataset: rows as token ids and labels, encoded once, kept in a compact form."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.store import TokenStore, type_of
from swiftlite.llm.template.base import IGNORE_INDEX, MaxLengthError, Outcome, Script, Template
from swiftlite.llm.template.jinja import RowWriter
from swiftlite.utils.errors import DatasetError, TemplateError
from swiftlite.utils.processes import end_with_parent
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.dataset.teacher import TeacherLogits

_BATCH = 256

Sample = Json


class EncodedDataset:
    """A map-style dataset: `len`, `[i]` -> what `template.encode` returns. Same rows, same order, same result.

    Args:
        rows: standard rows (see load_dataset). Rows that cannot be encoded are left out and counted in `report`.
        max_drop_ratio: DatasetError if more of the rows are left out, or all.
        name: what messages call the dataset. num_proc: processes that encode; the result is the same for any number.
        rejects: where rows that are left out are written.
    Attributes:
        report: DropReport. lengths: tokens per kept sample. row_indices: index in `rows` of each sample.
        teacher: what one thinks of the samples, where it was asked before training.
    """

    teacher: TeacherLogits | None = None

    def __init__(
        self,
        rows: Sequence[Json],
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
        with RowEncoder.of(rows, template, num_proc) as encode:
            for i, encoded in enumerate(encode(rows)):
                for sample in samples_of(encoded, self.report, place_of(rows[i], i), rows[i]):
                    self.row_indices.append(i)
                    self.store.append(sample)
        self.lengths = self.store.lengths()
        self.report.check(max_drop_ratio, name)

    @classmethod
    def of(cls, store: TokenStore) -> EncodedDataset:
        """All samples of a store."""
        dataset = cls.__new__(cls)
        dataset.store = store
        dataset.lengths = dataset.store.lengths()
        dataset.row_indices = list(range(len(dataset.store)))
        dataset.report = DropReport(total=len(dataset.store))
        return dataset

    def content_hash(self) -> str:
        return self.store.content_hash()

    def extra_values(self, name: str) -> set[object]:
        return self.store.extra_values(name)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Sample:
        return self.store[index]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.store)


def place_of(row: object, index: int) -> str:
    """Where a row stands: "file:line" where its reader said so, else its number."""
    return getattr(row, "place", f"row {index}")


def samples_of(encoded: Outcome, report: DropReport, place: str, row: object) -> list[Sample]:
    """The samples of one row's encoding, with the row's channel; a row without any is counted with its reason."""
    report.total += 1
    if isinstance(encoded, MaxLengthError):
        report.drop("longer than --max_length", place, encoded.seen, row)
        return []
    if isinstance(encoded, TemplateError):
        report.drop("cannot be encoded", place, str(encoded), row)
        return []
    # The first token is nobody's prediction. A sample with a label of its own needs none on tokens.
    parts = encoded if isinstance(encoded, list) else [encoded]
    kept = [p for p in parts if "label" in p or p["labels"][1:].count(IGNORE_INDEX) < len(p["labels"]) - 1]
    if not kept:
        report.drop("no assistant text with a loss", place, "", row)
    channel = row.get("channel") if isinstance(row, dict) else None
    return kept if channel is None else [{**part, "channel": channel} for part in kept]


class RowEncoder:
    """Encodes rows with a template, in several processes if asked for; the result is the same for any number.

    The processes are made here, so make it before threads and devices are in use. `with` ends them.
    """

    def __init__(self, template: Template, num_proc: int = 1) -> None:
        self.template, self.num_proc = template, num_proc
        self._numbers = itertools.count()
        self._children = [_Child(template) for _ in range(num_proc)] if num_proc > 1 else []
        self._writer = None if self._children else template.writer()

    @classmethod
    def of(cls, rows: Sequence[Json], template: Template, num_proc: int) -> RowEncoder:
        """One for these rows: a few are encoded faster than processes start."""
        return cls(template, num_proc if len(rows) > 2 * _BATCH else 1)

    def __enter__(self) -> RowEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        for child in self._children:
            child.process.kill()
            child.process.join()

    def __call__(self, rows: Iterable[Json]) -> Iterator[Outcome]:
        """`template.encode_batch` of all rows, in order. Raises: DatasetError if a process that encodes is killed."""
        if self._writer is not None:
            for batch in _batches(rows):
                yield from self.template.encode_batch(batch, self._writer)
            return
        waiting: deque[tuple[_Child, int]] = deque()
        try:
            for batch, child in zip(_batches(rows), itertools.cycle(self._children), strict=False):
                number = next(self._numbers)
                child.connection.send((number, batch))
                waiting.append((child, number))
                if len(waiting) > 4 * self.num_proc:  # enough that none is idle, and few rows are held twice
                    first, number = waiting.popleft()
                    yield from first.result(number)
            while waiting:
                first, number = waiting.popleft()
                yield from first.result(number)
        except (EOFError, OSError):
            raise DatasetError(
                f"--dataset_num_proc {self.num_proc}: a process that tokenises was killed, often for want of memory; "
                "use fewer processes"
            ) from None


class _Child:
    """A process that encodes batches, and the pipe to it.

    Each has a pipe of its own: where several share one (as in multiprocessing's pools), a process that is killed while
    it writes leaves the others, and the reader, waiting for ever.
    """

    def __init__(self, template: Template) -> None:
        # A child of a fork has the template already: nothing but rows and numbers travels.
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_encode_batches, args=(template, theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # then the pipe ends when the child does
        self._results: dict[int, list[Outcome] | Exception] = {}  # of other callers, who may take turns

    def result(self, number: int) -> list[Outcome]:
        """What the child made of batch `number`. Raises: EOFError or OSError if it is gone, what encoding raised."""
        while number not in self._results:
            made, value = self.connection.recv()
            self._results[made] = value
        value = self._results.pop(number)
        if isinstance(value, BaseException):
            raise value
        return value


def _encode_batches(template: Template, connection: Connection, parent: int) -> None:
    """In a child: answer (number, rows) with (number, encoded); numbers of tokens travel as arrays, not as objects."""
    end_with_parent(parent)
    # The terminal sends them to all processes: the run saves, and needs data for it.
    for sent in (signal.SIGINT, signal.SIGHUP):
        signal.signal(sent, signal.SIG_IGN)
    # The processes are the threads: a tokenizer that makes its own ones besides would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    batches: SimpleQueue[tuple[int, list[Json]]] = SimpleQueue()

    def receive() -> None:  # always, so that the parent never waits to send while this process waits to send
        with suppress(EOFError):
            while True:
                batches.put(connection.recv())
        os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    writer: RowWriter[Script] | None = None
    while True:
        number, rows = batches.get()
        try:
            writer = writer or template.writer()
            value: list[Outcome] | Exception = [_flat(encoded) for encoded in template.encode_batch(rows, writer)]
        except Exception as error:
            value = error
        connection.send((number, value))


def _flat(encoded: Outcome) -> Outcome:
    if isinstance(encoded, list):
        return [_flat_sample(part) for part in encoded]
    return encoded if isinstance(encoded, TemplateError) else _flat_sample(encoded)


def _flat_sample(encoded: Sample) -> Sample:
    return {name: array(code, value) if (code := type_of(name)) else value for name, value in encoded.items()}


def _batches(rows: Iterable[Json]) -> Iterator[list[Json]]:
    batch: list[Json] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
