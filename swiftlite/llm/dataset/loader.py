"""Datasets as rows in the standard form: read, sampled, mixed, split, with a report of what was dropped."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from swiftlite.llm.dataset.classes import Labels
from swiftlite.llm.dataset.group_rows import group_row
from swiftlite.llm.dataset.preprocess import Row, RowError, preprocess
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.sources import Item, Source, Spec, open_spec, parse_spec
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

T = TypeVar("T")
Placed: TypeAlias = tuple[str, object, Source]  # where a raw row stands, the row, and how its source reads it
Question: TypeAlias = tuple[str, object, Row | RowError]  # where a raw row stands, the row, its standard form


class PlacedRow(Json):
    """A standard row that knows where it stands ("file:line"), for those who drop it later."""

    __slots__ = ("place",)

    def __init__(self, row: Mapping[str, object], place: str) -> None:
        super().__init__(row)
        self.place = place


STOPPING_STRATEGIES = ("first_exhausted", "all_exhausted")


@dataclass(frozen=True)
class ReadOptions:
    """How datasets are read.

    columns: old column name -> new one. use_hf: ids without a prefix are Hugging Face's. num_proc: processes that parse
    CSV, Parquet and text, and fetch from hubs. model_name, model_author: text for {{NAME}} and {{AUTHOR}} in the rows
    (self-cognition data); of two values the first is for rows with "tag": "zh". answered: False where conversations are
    read rather than answered, see preprocess. labels: how the column `label` is read, None where it is not.
    grouped: rows are texts that belong together, see group_rows.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    use_hf: bool = False
    streaming: bool = False
    num_proc: int = 1
    hub_token: str | None = None
    model_name: Sequence[str] = ()
    model_author: Sequence[str] = ()
    answered: bool = True
    labels: Labels | None = None
    grouped: bool = False


def load_dataset(
    datasets: Sequence[str] | str,
    *,
    val_datasets: Sequence[str] | str = (),
    split_dataset_ratio: float = 0.0,
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    num_proc: int = 1,
    max_drop_ratio: float = 0.05,
    model_name: Sequence[str] | str | None = None,
    model_author: Sequence[str] | str | None = None,
    use_hf: bool = False,
    hub_token: str | None = None,
    interleave_prob: Sequence[float] | None = None,
    stopping_strategy: str = "first_exhausted",
    rejects: RejectsFile | None = None,
    answered: bool = True,
    labels: Labels | None = None,
    grouped: bool = False,
) -> tuple[list[Row], list[Row]]:
    """Read datasets into rows {"messages": [...], "tools"?: [...], "rejected_messages"?: [...], "label"?: ...}.

    Args:
        datasets: `[hf::|ms::]ID[:SUBSET/SUBSET][#N]`: files, directories, registered names or hub ids. N rows are
            chosen by seed (above the number of rows, whole rounds of it and a choice for the rest).
        val_datasets: the same, for evaluation. split_dataset_ratio: share of the training rows taken for it, by seed.
        max_drop_ratio: DatasetError if more of a dataset's rows cannot be used; fewer are counted in a warning.
        interleave_prob: one probability per dataset: rows are drawn from them in turn, each in its order, until one is
            used up (stopping_strategy 'first_exhausted') or each was once ('all_exhausted'). None: one after the other.
        columns, num_proc, model_name, model_author, use_hf, hub_token, answered, labels, grouped: see ReadOptions.
        rejects: where rows that cannot be used are written.
    Returns: (train rows, validation rows), in the files' order: shuffling is the trainer's.
    Raises: DatasetError for what cannot be read, or where too many rows are dropped.
    """
    name, author = _as_list(model_name), _as_list(model_author)
    options = ReadOptions(columns or {}, use_hf, False, num_proc, hub_token, name, author, answered, labels, grouped)

    def load(specs: Sequence[str] | str) -> list[list[Row]]:
        return [
            _load_one(spec, f"{seed}-{number}", options, max_drop_ratio, rejects)
            for number, spec in enumerate(_as_list(specs))
        ]

    parts, val = load(datasets), [row for part in load(val_datasets) for row in part]
    if interleave_prob:
        mixture = Mixture([len(part) for part in parts], interleave_prob, stopping_strategy, f"{seed}-mix")
        train = [parts[part][index] for part, index in mixture]
        get_logger().info("mixed %s into %d rows", " + ".join(str(len(part)) for part in parts), len(train))
    else:
        train = [row for part in parts for row in part]
    if not val and split_dataset_ratio > 0:
        if len(train) < 2:
            raise DatasetError(f"{len(train)} rows cannot be split; give --val_dataset or --split_dataset_ratio 0")
        count = min(max(1, round(len(train) * split_dataset_ratio)), len(train) - 1)
        chosen = set(random.Random(f"{seed}-split").sample(range(len(train)), count))
        val = [row for i, row in enumerate(train) if i in chosen]
        train = [row for i, row in enumerate(train) if i not in chosen]
    elif val and split_dataset_ratio > 0:
        get_logger().info("--split_dataset_ratio has no effect with --val_dataset")
    return train, val


def _load_one(
    text: str, seed: str, options: ReadOptions, max_drop_ratio: float, rejects: RejectsFile | None
) -> list[Row]:
    spec = parse_spec(text)
    report = DropReport(rejects=rejects)
    rows: list[Row] = []
    for place, item, source in _items(spec, options):
        report.total += 1
        row = standard_row(item, source, options)
        if isinstance(row, RowError):
            report.drop(row.reason, place, row.seen, row.row)
        else:
            rows.append(PlacedRow(row, place))
    if not report.total:
        raise DatasetError(f"{spec.name}: holds no rows; give a file with at least one")
    report.check(max_drop_ratio, spec.name)
    rows = _counted(rows, spec, seed)
    get_logger().info("%s: %d rows", spec.name, len(rows))
    return rows


def _items(spec: Spec, options: ReadOptions) -> Iterator[Placed]:
    for source in open_spec(spec, use_hf=options.use_hf, num_proc=options.num_proc, hub_token=options.hub_token):
        for place, item in source.read(0):
            yield place, item, source


def _counted(rows: list[T], spec: Spec, seed: str) -> list[T]:
    """`NAME#N`: whole rounds of the rows, and a choice for the rest."""
    if spec.count is None or (spec.at_most and spec.count >= len(rows)):
        return rows
    whole, rest = divmod(spec.count, len(rows))
    return rows * whole + [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), rest))]


def read_questions(datasets: Sequence[str], options: ReadOptions, seed: int = 42) -> list[Question]:
    """(place, raw row, standard row or why there is none) of datasets that a model is to answer.

    Read as load_dataset reads, but a row may end with a question, and rows that cannot be used keep their place.
    Raises: DatasetError for what cannot be read.
    """
    found: list[Question] = []
    for number, text in enumerate(datasets):
        spec = parse_spec(text)
        part = [
            (place, item, standard_row(item, source, options, answered=False))
            for place, item, source in _items(spec, options)
        ]
        if not part:
            raise DatasetError(f"{spec.name}: holds no rows; give a file with at least one")
        found += _counted(part, spec, f"{seed}-{number}")
    return found


def standard_row(item: Any, source: Source, options: ReadOptions, answered: bool = True) -> Row | RowError:
    """A raw row in the standard form, or why it has none. answered: see preprocess."""
    if isinstance(item, RowError):
        return item
    raw = item
    try:
        columns = {**source.columns, **options.columns}
        if source.preprocess is not None:
            if isinstance(item, Mapping):
                item = {columns.get(key, key): value for key, value in item.items()}
            item, columns = source.preprocess(item), {}
            if item is None:
                raise RowError("left out by the dataset's own preprocess")
        if options.grouped:
            return group_row(item, columns, answered)
        row = preprocess(item, columns, answered and options.answered)
        if options.labels is not None:
            row["label"] = options.labels.read(row)
        return _fill(row, raw, {"NAME": options.model_name, "AUTHOR": options.model_author})
    except RowError as error:
        error.row = raw
        return error
    except RecursionError:
        return RowError("nested too deeply", "", None)
    except Exception as error:  # a row costs itself, never the run
        if source.preprocess is None:
            return RowError("has a form that cannot be read", f"{type(error).__name__}: {error}", raw)
        return RowError(f"the dataset's own preprocess failed: {type(error).__name__}", str(error)[:200], raw)


# ---- mixing ----


class Mixture:
    """Draws from several datasets by probability: yields (dataset, index in it). Draw n is always the same.

    A dataset counts as used up when it is drawn once more after its last row.
    """

    def __init__(self, lengths: Sequence[int], probabilities: Sequence[float], strategy: str, seed: str) -> None:
        check_mixture(len(lengths), probabilities, strategy)
        self.lengths, self.strategy = lengths, strategy
        self.draw = Draws(probabilities, seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        at = [0] * len(self.lengths)
        ended = [False] * len(self.lengths)
        number = 0
        while True:
            part = self.draw(number)
            if at[part] == self.lengths[part]:
                at[part], ended[part] = 0, True
                if all(ended) or self.strategy == "first_exhausted":
                    return
            yield part, at[part]
            at[part] += 1
            number += 1


def check_mixture(num_datasets: int, probabilities: Sequence[float], strategy: str) -> None:
    """Raises: UsageError unless there is one positive probability per dataset, 1 together."""
    if strategy not in STOPPING_STRATEGIES:
        raise UsageError(f"--stopping_strategy {strategy}: must be one of {', '.join(STOPPING_STRATEGIES)}")
    shown = " ".join(f"{p:g}" for p in probabilities)
    if len(probabilities) != num_datasets:
        raise UsageError(f"--interleave_prob {shown}: {len(probabilities)} numbers for {num_datasets} datasets")
    if min(probabilities) <= 0 or abs(sum(probabilities) - 1) > 1e-3:
        raise UsageError(f"--interleave_prob {shown}: must be above 0 and sum to 1, not {sum(probabilities):g}")


class Draws:
    """The n-th draw of a dataset by probability, a function of the seed and n: a stream can resume anywhere."""

    _BLOCK = 4096

    def __init__(self, probabilities: Sequence[float], seed: str) -> None:
        self.probabilities, self.seed = list(probabilities), seed
        self._block: tuple[int, list[int]] = (-1, [])

    def __call__(self, number: int) -> int:
        block, index = divmod(number, self._BLOCK)
        if self._block[0] != block:
            choices = random.Random(f"{self.seed}-{block}").choices(
                range(len(self.probabilities)), self.probabilities, k=self._BLOCK
            )
            self._block = (block, choices)
        return self._block[1][index]


# ---- streams ----


class RowStream:
    """Rows of datasets one by one, never all in memory; `state()` says where it stands, as plain values.

    One pass over the data: datasets one after the other, or drawn by `interleave_prob` (see load_dataset). `#N` takes
    the first N rows (from the beginning again where there are fewer). Bad rows come as RowError.
    """

    def __init__(
        self,
        datasets: Sequence[str],
        options: ReadOptions,
        *,
        interleave_prob: Sequence[float] | None = None,
        stopping_strategy: str = "first_exhausted",
        seed: str = "42",
        state: Json | None = None,
    ) -> None:
        self.options, self.strategy = options, stopping_strategy
        if interleave_prob:
            check_mixture(len(datasets), interleave_prob, stopping_strategy)
        specs = [parse_spec(text) for text in datasets]
        self.parts = []
        for spec in specs:
            sources = open_spec(spec, use_hf=options.use_hf, streaming=True, hub_token=options.hub_token)
            self.parts.append(_Part(sources, spec))
        self.draws = Draws(interleave_prob, f"{seed}-mix") if interleave_prob else None
        self.drawn, self.current = 0, 0
        self.ended = [False] * len(self.parts)
        if state is not None:
            self.drawn = state["drawn"]
            self.current = state["current"]
            self.ended = list(state["ended"])
            for part, where in zip(self.parts, state["parts"], strict=True):
                part.seek(where)

    @property
    def files(self) -> list[Path]:
        """The local files that the rows are in."""
        return [file for part in self.parts for source in part.sources for file in source.files]

    def state(self) -> Json:
        return {
            "drawn": self.drawn,
            "current": self.current,
            "ended": list(self.ended),
            "parts": [part.state() for part in self.parts],
        }

    def __iter__(self) -> Iterator[tuple[str, Row | RowError]]:
        while True:
            found = self._next_mixed() if self.draws else self._next_in_turn()
            if found is None:
                return
            place, item, source = found
            yield place, standard_row(item, source, self.options)

    def _next_in_turn(self) -> Placed | None:
        while self.current < len(self.parts):
            found = self.parts[self.current].next()
            if found is not None:
                return found
            self.current += 1
        return None

    def _next_mixed(self) -> Placed | None:
        assert self.draws is not None
        while True:
            if any(self.ended) if self.strategy == "first_exhausted" else all(self.ended):
                return None
            part = self.draws(self.drawn)
            found = self.parts[part].next()
            if found is not None:
                self.drawn += 1
                return found
            # It ended with the row before: the draw is made again, or this part starts anew.
            self.ended[part] = True
            if self.strategy == "all_exhausted" and not all(self.ended):
                self.parts[part].seek({"round": self.parts[part].round + 1, "source": 0, "row": 0, "taken": 0})


class _Part:
    """One dataset of a stream."""

    def __init__(self, sources: Sequence[Source], spec: Spec) -> None:
        self.sources, self.spec = sources, spec
        self.seek({"round": 0, "source": 0, "row": 0, "taken": 0})

    def state(self) -> dict[str, int]:
        return {"round": self.round, "source": self.source, "row": self.row, "taken": self.taken}

    def seek(self, state: Mapping[str, int]) -> None:
        self.round, self.source = state["round"], state["source"]
        self.row, self.taken = state["row"], state["taken"]
        self._rows: Iterator[Item] | None = None

    def next(self) -> Placed | None:
        count = self.spec.count
        if count is not None and self.taken >= count:
            return None
        while True:
            if self.source >= len(self.sources):
                if not self.taken:
                    raise DatasetError(f"{self.spec.name}: holds no rows; give a file with at least one")
                if count is None or self.spec.at_most:
                    return None
                self.source, self.row = 0, 0  # fewer rows than asked for: once more
            source = self.sources[self.source]
            if self._rows is None:
                self._rows = source.read(self.row)
            item = next(self._rows, None)
            if item is not None:
                self.row += 1
                self.taken += 1
                return item[0], item[1], source
            self.source += 1
            self.row, self._rows = 0, None


# ---- names ----


def _fill(row: Row, item: Any, fill: Mapping[str, Sequence[str]]) -> Row:
    """Put names into {{NAME}} and {{AUTHOR}} of a self-cognition row."""
    if not any(fill.values()):
        return row
    is_chinese = isinstance(item, Mapping) and item.get("tag") == "zh"

    def filled(text: str) -> str:
        for name, values in fill.items():
            if values:
                text = text.replace("{{" + name + "}}", values[0 if is_chinese else -1])
        return text

    for key in ("messages", "rejected_messages"):
        if key in row:
            row[key] = [{**message, "content": filled(message["content"])} for message in row[key]]
    return row


def _as_list(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
