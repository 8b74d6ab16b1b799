"""PairDataset: a chosen and a rejected answer to each prompt, as token ids; for preference training on either side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from swiftlite.llm.dataset.encoded import RowEncoder, Sample, place_of
from swiftlite.llm.dataset.packing import pack_windows
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.store import TokenStore
from swiftlite.llm.template.base import IGNORE_INDEX, MaxLengthError, Template
from swiftlite.train.questions import Questions
from swiftlite.utils.errors import DatasetError, TemplateError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

SIDES = ("chosen", "rejected")


class PairDataset:
    """A map-style dataset of pairs. `[i]` -> {"pairs": [PAIR, ...], "length": tokens of all answers with their prompts}.

    A PAIR is {"chosen": {"input_ids", "labels", "reference"?}, "rejected": {...}, "margin"?: how much better the chosen one
    is}. An item is one pair, or with `capacity` as many as have room in so many tokens (a longer pair is alone).

    Args: rows: standard rows with `rejected_messages`. The rest as EncodedDataset.
    Attributes:
        pairs: number of pairs. row_indices: index in `rows` of each pair. sizes: tokens of each pair. items: pairs of each
            item. lengths: tokens of each item.
        reference: log-probabilities under the reference model, of the chosen and the rejected answer of each pair, once
            somebody has computed them.
    """

    def __init__(
        self,
        rows: Sequence[Json],
        template: Template,
        *,
        capacity: int | None = None,
        seed: int = 42,
        max_drop_ratio: float = 0.05,
        name: str = "dataset",
        num_proc: int = 1,
        rejects: RejectsFile | None = None,
    ) -> None:
        if not rows:
            raise DatasetError(f"{name}: holds no rows; give a file with at least one")
        self.report = DropReport(rejects=rejects, log=[])
        self.store = TokenStore()
        self.row_indices: list[int] = []
        self.reference: Sequence[float] = ()
        with RowEncoder.of(rows, template, num_proc) as encode:
            encoded = encode(side for row in rows for side in _sides(row))
            for i, row in enumerate(rows):
                pair = next(encoded), next(encoded)
                self._add(pair, place_of(row, i), row)
                self.row_indices += [i] * (self.pairs - len(self.row_indices))
        self.report.check(max_drop_ratio, name)
        self._arrange(capacity, seed, name)

    @classmethod
    def of(cls, store: TokenStore, capacity: int | None, seed: int, name: str) -> PairDataset:
        """All pairs of a store that another one had."""
        dataset = cls.__new__(cls)
        dataset.report = DropReport(total=len(store))
        dataset.store, dataset.reference = store, ()
        dataset.row_indices = list(range(len(store)))
        dataset._arrange(capacity, seed, name)
        return dataset

    def _arrange(self, capacity: int | None, seed: int, name: str) -> None:
        lengths = [self.store.lengths(f"{side}_input_ids") for side in SIDES]
        self.sizes = [chosen + rejected for chosen, rejected in zip(*lengths, strict=True)]
        self.items = [[i] for i in range(self.pairs)]
        if capacity is not None:
            self.items = pack_windows([min(size, capacity) for size in self.sizes], capacity, seed)
            get_logger().info(
                "%s: %d pairs packed into %d sequences of %d tokens", name, self.pairs, len(self), capacity
            )

    def _add(self, pair: tuple[Any, Any], place: str, row: Json) -> None:
        self.report.total += 1
        if not row.get("rejected_messages"):
            return self.report.drop("no rejected answer", place, "give rejected_messages or rejected_response", row)
        for side in pair:
            if isinstance(side, MaxLengthError):
                return self.report.drop("longer than --max_length", place, side.seen, row)
            if isinstance(side, TemplateError):
                return self.report.drop("cannot be encoded", place, str(side), row)
            if all(label == IGNORE_INDEX for label in side["labels"][1:]):
                return self.report.drop("no assistant text with a loss", place, "", row)
            if "loss_scale" in side:
                return self.report.drop(
                    "a loss weight other than 0 and 1", place, "preference losses compare whole answers", row
                )
        chosen, rejected = pair
        if list(chosen["input_ids"]) == list(rejected["input_ids"]):
            return self.report.drop("both answers are the same", place, "", row)
        columns = {f"{side}_{name}": values[name] for side, values in zip(SIDES, pair, strict=True)
                   for name in ("input_ids", "labels")}  # fmt: skip
        return self.store.append({**columns, **({"margin": row["margin"]} if "margin" in row else {})})

    @property
    def pairs(self) -> int:
        return len(self.store)

    def pair(self, index: int) -> Json:
        pair: Json = {side: self.sequence(2 * index + number) for number, side in enumerate(SIDES)}
        margin = self.store[index].get("margin")
        return pair if margin is None else {**pair, "margin": margin}

    def sequence(self, number: int) -> Sample:
        """Answer `number` of all: chosen and rejected in turn."""
        columns, side = self.store[number // 2], SIDES[number % 2]
        found: Sample = {name: columns[f"{side}_{name}"] for name in ("input_ids", "labels")}
        return {**found, "reference": self.reference[number]} if self.reference else found

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions[int]:
        """What a reference is asked of all pairs, whatever the global batches are."""
        return Questions(range(2 * self.pairs), self.sequence, self.remember)

    def remember(self, keys: Sequence[int], values: Sequence[float]) -> None:
        self.reference = values

    @property
    def lengths(self) -> list[int]:
        return [sum(self.sizes[i] for i in item) for item in self.items]

    def content_hash(self) -> str:
        return self.store.content_hash(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Json:
        return {
            "pairs": [self.pair(i) for i in self.items[index]],
            "length": sum(self.sizes[i] for i in self.items[index]),
        }

    def __iter__(self) -> Iterator[Json]:
        return (self[i] for i in range(len(self)))


def _sides(row: Json) -> tuple[Sample, Sample]:
    common = {"tools": row["tools"]} if "tools" in row else {}
    chosen = {"messages": row["messages"], **common}
    return chosen, {"messages": row.get("rejected_messages") or row["messages"], **common}


def sequences_of(items: Sequence[Json]) -> list[Sample]:
    """The answers of a batch in the order that losses expect: all chosen ones, then all rejected ones."""
    return [pair[side] for side in SIDES for item in items for pair in item["pairs"]]
