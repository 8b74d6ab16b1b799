"""StreamedDataset: rows are read, encoded and packed while training runs; memory holds a few windows of them.

Sample n of the stream is always the same, whatever the number of ranks or processes. So a run can resume from nothing
but n; `state(n)` makes that fast: it says where the window that holds n begins.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swiftlite.llm.dataset.encoded import RowEncoder, samples_of
from swiftlite.llm.dataset.loader import RowStream
from swiftlite.llm.dataset.packing import joined, pack, pack_in_order
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.store import TokenStore
from swiftlite.llm.template.base import Template
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.dataset.teacher import TeacherLogits

State = Json
# A window's first sample, its epoch and number, and the state of the rows (None: at their beginning).
_BEGINNING: State = {"first": 0, "epoch": 0, "number": 0, "rows": None}


@dataclass
class _Window:
    """Samples first .. first + len(samples) of the stream, and where the rows behind them begin and end."""

    first: int
    begin: State
    end: State
    store: TokenStore
    sequences: list[list[int]]  # packed: samples of each sequence; else one each


class StreamedDataset:
    """An endless dataset: `[n]` for ascending n; epoch after epoch, each window of rows shuffled on its own.

    Args:
        open_rows: opens the rows at a state of RowStream (None: the beginning of an epoch).
        window: rows that are shuffled and packed together. capacity: tokens of a packed sequence, None: no packing.
        in_order: neighbours are packed together, not what fits best.
        num_proc: processes that encode. max_drop_ratio: DatasetError if more of the rows seen so far are left out.
        facts: of the files that the rows are in, see facts_of_files; empty where there are none.
    """

    is_streaming = True
    teacher: TeacherLogits | None = None  # as an EncodedDataset's

    def __init__(
        self,
        open_rows: Callable[[State | None], RowStream],
        template: Template,
        *,
        seed: int = 42,
        shuffle: bool = True,
        window: int = 1000,
        capacity: int | None = None,
        in_order: bool = False,
        num_proc: int = 1,
        max_drop_ratio: float = 0.05,
        rejects: RejectsFile | None = None,
        name: str = "training data",
        facts: Mapping[str, object] | None = None,
    ) -> None:
        self.open_rows, self.seed = open_rows, seed
        self.shuffle = shuffle
        self.facts = dict(facts or {})
        self.window, self.in_order = window, in_order
        self.capacity = capacity
        self._encode = RowEncoder(template, num_proc)
        self.max_drop_ratio, self.name = max_drop_ratio, name
        self.report = DropReport(rejects=rejects)
        self.is_packed = capacity is not None
        self._rows: tuple[State, RowStream] | None = None
        self._tokens = self._room = 0
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._start: State = dict(_BEGINNING)
        self._begins: deque[State] = deque(maxlen=256)  # of windows that were read, so that a state is found quickly
        self._windows: list[_Window] = []
        self._next: Future[_Window] | None = None

    @property
    def fill_rate(self) -> float:
        """Share of the room of packed sequences that was used so far."""
        return self._tokens / max(1, self._room)

    def state(self, position: int) -> State:
        """Plain values from which `load_state` finds sample `position` without reading what is before its window."""
        if self._windows and position >= self._windows[-1].end["first"]:
            return self._windows[-1].end
        known = [begin for begin in self._begins if begin["first"] <= position]
        return known[-1] if known else self._begin_before(position)

    def _begin_before(self, position: int) -> State:
        return self._start if self._start["first"] <= position else dict(_BEGINNING)

    def load_state(self, state: State) -> None:
        """Go to where `state` was taken; samples before its window are still there, read anew."""
        if self._next is not None and not self._next.cancel():
            self._next.exception()  # what is being read ends first
        self._start = dict(state)
        self._windows, self._next = [], None
        self._rows = None
        self._begins.clear()

    def __getitem__(self, position: int) -> Json:
        """Raises: DatasetError where the data holds no usable row."""
        if position < (self._windows[0].first if self._windows else self._start["first"]):
            self.load_state(self.state(position))  # back
        while not self._windows or position >= self._windows[-1].first + len(self._windows[-1].sequences):
            begin = self._windows[-1].end if self._windows else self._start
            window = self._next.result() if self._next is not None else self._read(begin)
            self._windows = [*self._windows[-1:], window]
            self._begins.append(window.begin)
            self._next = self._executor.submit(self._read, window.end)
        window = next(w for w in reversed(self._windows) if w.first <= position)
        samples = [window.store[i] for i in window.sequences[position - window.first]]
        return joined(samples) if self.is_packed else samples[0]

    def _read(self, begin: State) -> _Window:
        """The next window that has samples."""
        state, epochs_without = begin, 0
        while True:
            window = self._read_rows(state)
            if window.sequences:
                window.begin = begin
                return window
            if window.end["epoch"] != state["epoch"]:
                epochs_without += 1
                if epochs_without > 1:
                    self.report.check(1.0, self.name)
                    raise DatasetError(f"{self.name}: holds no rows that can be used")
            state = window.end

    def _read_rows(self, begin: State) -> _Window:
        if self._rows is None or self._rows[0] != begin:
            self._rows = (begin, self.open_rows(begin["rows"]))
        stream = self._rows[1]
        rows: list[Json] = []
        places: list[str] = []
        ended = True
        for place, row in stream:
            if isinstance(row, RowError):
                self.report.total += 1
                self.report.drop(row.reason, place, row.seen, row.row)
                places.append("")
            else:
                rows.append(row)
                places.append(place)
            if len(places) == self.window:
                ended = False
                break
        places = [place for place in places if place]
        if self.shuffle:
            order = list(range(len(rows)))
            random.Random(f"{self.seed}-{begin['number']}").shuffle(order)
            rows, places = [rows[i] for i in order], [places[i] for i in order]
        store = TokenStore()
        for place, row, encoded in zip(places, rows, self._encode(rows), strict=True):
            for sample in samples_of(encoded, self.report, place, row):
                store.append(sample)
        if self.report.dropped and (ended or self.report.total >= self.window):
            self._check_dropped()
        lengths = store.lengths()
        packed = pack_in_order if self.in_order else pack
        sequences = packed(lengths, self.capacity) if self.capacity else [[i] for i in range(len(store))]
        if self.capacity:
            self._tokens += sum(lengths)
            self._room += len(sequences) * self.capacity
        end = {
            "first": begin["first"] + len(sequences),
            "epoch": begin["epoch"] + ended,
            "number": begin["number"] + 1,
            "rows": None if ended else stream.state(),
        }
        self._rows = None if ended else (end, stream)
        return _Window(begin["first"], begin, end, store, sequences)

    def _check_dropped(self) -> None:
        """Stop above the limit; what is below it is told once at the end of the first epoch, and by the rejects file."""
        if self.report.dropped > self.max_drop_ratio * self.report.total:
            self.report.check(self.max_drop_ratio, self.name)
