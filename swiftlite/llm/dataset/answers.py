"""AnswerDataset: answers that are each desirable or not, as token ids; for KTO on either side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.dataset.cache import load_cached_store
from swiftlite.llm.dataset.encoded import EncodedDataset, Sample
from swiftlite.llm.dataset.packing import pack_windows
from swiftlite.llm.dataset.prepare import encode, load_cached, packing_capacity
from swiftlite.llm.dataset.preprocess import Row
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.rows import made_of_rows
from swiftlite.llm.dataset.store import DESIRABLE, TokenStore
from swiftlite.llm.template.collate import IGNORE_INDEX
from swiftlite.train.batches import Neighbour, neighbours
from swiftlite.train.questions import Questions
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template


class AnswerDataset:
    """A map-style dataset of answers with their prompts: `[i]` -> {"answers": [ANSWER, ...], "length": their tokens}.

    An ANSWER is {"input_ids", "labels", "desirable", "reference"?}. An item is one, or with `capacity` as many as have room
    in so many tokens. Of a Neighbour each has "mismatched" besides: its prompt with the answer before it in the global
    batch, {"input_ids", "labels", "reference"?}; cut at `max_length`. That is how trl pairs them, within a global batch.

    Args: samples: tokenised rows. desirable: of each sample.
    Attributes: items: samples of each item. lengths: tokens of each item. reference: log-probabilities under the reference
        model by (sample of the prompt, sample of the answer), once somebody has computed them.
    """

    def __init__(
        self,
        samples: EncodedDataset,
        desirable: Sequence[bool],
        max_length: int | None,
        *,
        capacity: int | None = None,
        seed: int = 42,
        name: str = "dataset",
    ) -> None:
        self.samples, self.desirable = samples, desirable
        self.max_length = max_length
        self.reference: dict[tuple[int, int], float] = {}
        self.items = [[i] for i in range(len(samples))]
        if capacity is not None:
            self.items = pack_windows(samples.lengths, capacity, seed)
            get_logger().info(
                "%s: %d answers packed into %d sequences of %d tokens", name, len(samples), len(self), capacity
            )
        self.lengths = [sum(samples.lengths[i] for i in item) for item in self.items]

    @property
    def store(self) -> TokenStore:
        """The answers, to be written."""
        store = TokenStore()
        for sample, good in zip(self.samples, self.desirable, strict=True):
            store.append({**sample, DESIRABLE: good})
        return store

    def content_hash(self) -> str:
        good = [i for i, good in enumerate(self.desirable) if good]
        return self.samples.store.content_hash([good, *([] if len(self) == len(self.samples) else self.items)])

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Json]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Json:
        answers = [{**self.sequence((i, i)), "desirable": self.desirable[i]} for i in self.items[index]]
        if isinstance(index, Neighbour):
            for answer, key in zip(answers, self._mismatched(index), strict=True):
                answer["mismatched"] = self.sequence(key)
        return {"answers": answers, "length": self.lengths[index]}

    def _mismatched(self, index: Neighbour) -> list[tuple[int, int]]:
        """(sample of the prompt, sample of the answer before it) of an item."""
        own = self.items[index]
        return list(zip(own, [self.items[index.before][-1], *own[:-1]], strict=True))

    def sequence(self, key: tuple[int, int]) -> Sample:
        """The prompt of one sample with the answer of another, or its own."""
        prompt, answer = (self.samples[i] for i in key)
        found = {name: prompt[name] for name in ("input_ids", "labels")}
        if key[0] != key[1]:
            end, start = (_answer_start(sample) for sample in (prompt, answer))
            ids = prompt["input_ids"][:end] + answer["input_ids"][start:]
            labels = [IGNORE_INDEX] * end + answer["labels"][start:]
            found = {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}
        return {**found, "reference": self.reference[key]} if self.reference else found

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions[tuple[int, int]]:
        """What a reference is asked in these global batches."""
        keys: dict[tuple[int, int], None] = {}
        for batch in batches:
            for i in neighbours(batch):
                if isinstance(i, Neighbour):
                    keys.update(dict.fromkeys([*((n, n) for n in self.items[i]), *self._mismatched(i)]))
        return Questions(list(keys), self.sequence, self.remember)

    def remember(self, keys: Sequence[tuple[int, int]], values: Sequence[float]) -> None:
        self.reference = dict(zip(keys, values, strict=True))


def answers_of(items: Sequence[Json]) -> list[Sample]:
    """The answers of a batch, in their order."""
    return [answer for item in items for answer in item["answers"]]


def _answer_start(sample: Sample) -> int:
    """Where the tokens with a label begin."""
    return next(t for t, label in enumerate(sample["labels"]) if t and label != IGNORE_INDEX)


def say_balance(desirable: Sequence[bool], good: float, bad: float) -> None:
    """Warn where the weights of the two kinds make up badly for how many there are of each, as trl does.

    Args: good, bad: --desirable_weight, --undesirable_weight. Source: KTO 2402.01306, equation 8: the ratio of the weighted
        numbers should be between 1 and 4/3.
    """
    count = sum(desirable)
    others = len(desirable) - count
    if not count or not others:
        get_logger().warning(
            "all %d answers are %sdesirable: KTO learns from the difference of both kinds; label some the other way",
            len(desirable), "" if count else "un",
        )  # fmt: skip
        return
    low, high = others * bad / count, 1.33 * others * bad / count
    least, most = count * good / others / 1.33, count * good / others
    if count != others and not (round(low, 2) <= good <= round(high, 2) or round(least, 2) <= bad <= round(most, 2)):
        get_logger().warning(
            "%d answers are desirable and %d are not: give --desirable_weight %.2f to %.2f, or --undesirable_weight %.2f "
            "to %.2f", count, others, low, high, least, most,
        )  # fmt: skip


def load_answers(args: DpoArguments, template: Template) -> tuple[AnswerDataset, AnswerDataset | None]:
    """(training answers, validation answers or None), with labels. Raises: UsageError without data; DatasetError."""
    if args.packing:
        template.padding_free = True

    def cached(paths: Sequence[str], parts: Sequence[str]) -> AnswerDataset | None:
        store = load_cached_store(paths, template, "answers", parts)
        if store is None:
            return None
        return _arranged(EncodedDataset.of(store), [bool(v) for v in store.extras(DESIRABLE)], args, parts[0])

    def made(rows: list[Row], rejects: RejectsFile | None, name: str) -> AnswerDataset:
        return make_answers(rows, args, template, rejects, name)

    train, val = load_cached(args, cached) if args.cached_dataset else made_of_rows(args, made)
    say_balance(train.desirable, args.desirable_weight, args.undesirable_weight)
    return train, val


def make_answers(
    rows: list[Row], args: BaseArguments, template: Template, rejects: RejectsFile | None, name: str
) -> AnswerDataset:
    """From rows as `labelled` gives them."""
    samples = encode(rows, args, template, rejects, name)
    return _arranged(samples, [rows[i]["label"] for i in samples.row_indices], args, name)


def _arranged(samples: EncodedDataset, desirable: Sequence[bool], args: BaseArguments, name: str) -> AnswerDataset:
    capacity = packing_capacity(args)
    return AnswerDataset(samples, desirable, args.max_length, capacity=capacity, seed=args.data_seed or 0, name=name)
