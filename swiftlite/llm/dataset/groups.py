"""GroupDataset: texts that belong together, as token ids; for embedding models and rerankers, on either side.

Rows come in the form of group_rows.py. A group is, by `--task_type`:
- embedding: an anchor, one positive, any number of negatives, each a text of its own;
- reranker: the query with each document, first one that answers it, then others: conversations in which the assistant gives
  the document;
- generative_reranker: the same as questions that the model answers with yes or no.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TypeVar

import torch
from torch import Tensor

from swiftlite.arguments.groups import GroupArguments
from swiftlite.arguments.task import JUDGING_WORDS, TaskArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.llm.dataset.encoded import RowEncoder, Sample, place_of
from swiftlite.llm.dataset.group_rows import text_of
from swiftlite.llm.dataset.preprocess import Message, Row, RowError
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.rows import made_of_rows
from swiftlite.llm.dataset.store import TokenStore
from swiftlite.llm.template.base import MaxLengthError, Outcome, Template
from swiftlite.llm.template.limits import check_characters, check_length
from swiftlite.train.vector_loss import ANCHOR, NEGATIVE, POSITIVE
from swiftlite.utils.errors import DatasetError, TemplateError, UsageError
from swiftlite.utils.types import Json

T = TypeVar("T")
_BATCH = 1024

# The question of Qwen3-Reranker, and what it retrieves where nobody says it (model card of Qwen/Qwen3-Reranker-0.6B).
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer "
    'can only be "yes" or "no".'
)
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


@dataclass(frozen=True)
class Group:
    """samples: what is encoded. facts: `label` of the pair, or `relevant` for each sample: 1 or 0."""

    samples: list[Sample]
    facts: Json


@dataclass(frozen=True)
class Grouping:
    """How a row becomes groups: one for each positive, all with the same negatives.

    labelled: True: pairs need a label; False: they must have none, or 1. Of more positives or negatives than the numbers
    allow, a choice by seed.
    """

    task_type: str
    loss_type: str
    max_positives: int | None = 1
    max_negatives: int | None = None
    seed: int = 42

    @classmethod
    def of(cls, args: GroupArguments, loss: str) -> Grouping:
        """What the flags say."""
        most = args.max_positive_samples, args.max_negative_samples
        return cls(args.task_type or "", loss, *most, args.data_seed or 0)

    def groups(self, row: Row, number: int) -> list[Group]:
        """Raises: RowError for a row that this loss cannot learn from."""
        choose = random.Random(f"{self.seed}-{number}")
        positives = _at_most(row["positive_messages"], self.max_positives, choose)
        negatives = _at_most(row["negative_messages"], self.max_negatives, choose)
        label = self._label(row)
        texts = [text_of(row["messages"]), *map(text_of, negatives)]
        if any(text_of(positive) in texts for positive in positives):
            raise RowError("two texts of a group are the same", "the positive is also its query or a negative")
        if self.task_type == "embedding":
            facts = {} if label is None else {"label": label}
            others = negatives if self.loss_type == "infonce" else []
            return [
                Group([{"messages": text} for text in (row["messages"], positive, *others)], facts)
                for positive in positives
            ]
        if self.loss_type == "listwise_reranker" and not negatives:
            raise RowError("no negative", "listwise_reranker chooses among documents; give negative_messages")
        write = judged if self.task_type == "generative_reranker" else answered
        found = []
        for positive in positives:
            documents = [positive, *negatives]
            samples: list[Sample] = [{"messages": write(row["messages"], document)} for document in documents]
            found.append(Group(samples, {"relevant": [1.0 if label is None else label, *[0.0] * len(negatives)]}))
        return found

    def _label(self, row: Row) -> float | None:
        label: float | None = row.get("label")
        if self.loss_type == "cosine_similarity" or self.loss_type.endswith("contrastive"):
            if label is None:
                raise RowError("no label", f"--loss_type {self.loss_type} needs one for each pair")
            if self.loss_type != "cosine_similarity" and label not in (0.0, 1.0):
                raise RowError("label is neither 0 nor 1", f"{label:g}; --loss_type cosine_similarity takes any number")
            return label
        if self.loss_type == "pointwise_reranker":
            if label is not None and not 0 <= label <= 1:
                raise RowError("label is not between 0 and 1", f"{label:g}")
            return label
        if label not in (None, 1.0):
            raise RowError(
                "a label that is not 1", f"{label:g}; --loss_type {self.loss_type} learns from texts that match"
            )
        return None


def _at_most(items: Sequence[T], count: int | None, choose: random.Random) -> list[T]:
    if count is None or len(items) <= count:
        return list(items)
    return [items[i] for i in sorted(choose.sample(range(len(items)), count))]


def answered(query: Sequence[Message], document: Sequence[Message]) -> list[Message]:
    """Query and document as a conversation; a system message of the document goes before the query's."""
    system = [message for message in document if message["role"] == "system"][:1]
    rest = [message for message in query if not (system and message["role"] == "system")]
    return [*system, *rest, {"role": "assistant", "content": _said(document)}]


def judged(query: Sequence[Message], document: Sequence[Message]) -> list[Message]:
    """The question whether a document answers a query, in Qwen3-Reranker's words; system messages are its instruction."""
    told = [str(message["content"]) for part in (document, query) for message in part if message["role"] == "system"]
    asked = f"<Instruct>: {told[0] if told else INSTRUCTION}\n<Query>: {_said(query)}\n<Document>: {_said(document)}"
    return [{"role": "system", "content": JUDGE}, {"role": "user", "content": asked}]


def _said(messages: Sequence[Message]) -> str:
    return text_of([message for message in messages if message["role"] != "system"])


class TextEncoder:
    """Texts as token ids with the tokens that the tokenizer itself adds, as sentence-transformers encodes them.

    pairs: query and document go to the tokenizer as two texts, as sentence-transformers' CrossEncoder gives them.
    A text that is too long is cut with --truncation_strategy left or right; its end token stays.
    """

    def __init__(self, template: Template, pairs: bool = False) -> None:
        self.template, self.pairs = template, pairs

    @classmethod
    def of(cls, template: Template, task_type: str) -> TextEncoder | None:
        """None where the chat template writes the samples of a task."""
        if task_type == "embedding" or (task_type == "reranker" and not template.use_chat_template):
            return cls(template, pairs=task_type == "reranker")
        return None

    def __enter__(self) -> TextEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, samples: Iterable[Sample]) -> Iterator[Outcome]:
        rest = iter(samples)
        while batch := list(islice(rest, _BATCH)):
            yield from self.encode([self._texts(sample["messages"]) for sample in batch])

    def _texts(self, messages: list[Message]) -> tuple[str, ...]:
        return (text_of(messages[:-1]), text_of(messages[-1:])) if self.pairs else (text_of(messages),)

    def encode(self, samples: Sequence[tuple[str, ...]]) -> list[Outcome]:
        """input_ids of each, of one text or two, or what is wrong with it."""
        template, tokenizer = self.template, self.template.tokenizer
        found: list[Outcome] = []
        for texts in samples:
            try:
                check_characters("".join(texts))
                check_length("".join(texts))
                found.append({})
            except TemplateError as error:
                found.append(error)
        cut = template.truncation_strategy in ("left", "right") and template.max_length is not None
        if cut:
            tokenizer.truncation_side = template.truncation_strategy
        good = [i for i, outcome in enumerate(found) if not isinstance(outcome, TemplateError)]
        options = {"truncation": True, "max_length": template.max_length} if cut else {}
        plain = {"return_attention_mask": False, "verbose": False, **options}
        given = [list(column) for column in zip(*(samples[i] for i in good), strict=True)]
        encoded = tokenizer(*given, **plain)["input_ids"] if good else ()
        for i, ids in zip(good, encoded, strict=True):
            too_long = template.max_length is not None and len(ids) > template.max_length
            found[i] = MaxLengthError(len(ids), template.max_length or 0) if too_long else {"input_ids": list(ids)}
        return found


class GroupDataset:
    """A map-style dataset. `[i]` -> {"input_ids": of all samples end to end, "sizes": tokens of each, "label" or "relevant"
    as in Group, "length"}; `parts_of` takes the samples apart.

    Args: rows: in the form of group_rows.py. The rest as EncodedDataset. Groups that cannot be used, that stand in the data
        twice, or of which a sample is too long, are left out and counted in `report`.
    task_type: what the groups are for. words: see judging_tokens, of --task_type generative_reranker.
    """

    words: tuple[int, int] = (-1, -1)

    def __init__(
        self,
        rows: Sequence[Row],
        template: Template,
        grouping: Grouping,
        *,
        max_drop_ratio: float = 0.05,
        name: str = "dataset",
        num_proc: int = 1,
        rejects: RejectsFile | None = None,
    ) -> None:
        if not rows:
            raise DatasetError(f"{name}: holds no rows; give a file with at least one")
        self.report = DropReport(rejects=rejects, log=[])
        self.store = TokenStore()
        encoder = TextEncoder.of(template, grouping.task_type) or RowEncoder.of(rows, template, num_proc)
        self.task_type = grouping.task_type
        self.row_indices: list[int] = []  # of each group
        waiting: deque[tuple[int, Row, Group]] = deque()
        with encoder as encode:
            encoded = iter(encode(self._samples(rows, grouping, waiting)))
            for first in encoded:
                number, row, group = waiting.popleft()
                self._add([first, *islice(encoded, len(group.samples) - 1)], group, number, row)
        self.report.check(max_drop_ratio, name)
        self.lengths = self.store.lengths()

    @classmethod
    def of(cls, store: TokenStore, task_type: str) -> GroupDataset:
        """All groups of a store that another one had."""
        dataset = cls.__new__(cls)
        dataset.report, dataset.task_type = DropReport(total=len(store)), task_type
        dataset.store, dataset.lengths = store, store.lengths()
        dataset.row_indices = list(range(len(store)))
        return dataset

    def _samples(
        self, rows: Sequence[Row], grouping: Grouping, waiting: deque[tuple[int, Row, Group]]
    ) -> Iterator[Sample]:
        """What is to be encoded; `waiting` gets the groups that it makes up."""
        seen: dict[int, str] = {}  # a row that `#N` repeats stands in one place
        for number, row in enumerate(rows):
            place = place_of(row, number)
            try:
                groups = grouping.groups(row, number)
            except RowError as error:
                self.report.total += 1
                self.report.drop(error.reason, place, error.seen, row)
                continue
            for group in groups:
                self.report.total += 1
                key = hash(str([group.samples[:2] if grouping.task_type == "embedding" else group.samples[0]]))
                if seen.setdefault(key, place) != place:
                    self.report.drop("the same pair twice", place, f"as {seen[key]}", row)
                    continue
                waiting.append((number, row, group))
                yield from group.samples

    def _add(self, encoded: Sequence[Outcome], group: Group, number: int, row: Row) -> None:
        place = place_of(row, number)
        for sample in encoded:
            if isinstance(sample, MaxLengthError):
                return self.report.drop("longer than --max_length", place, sample.seen, row)
            if isinstance(sample, TemplateError):
                return self.report.drop("cannot be encoded", place, str(sample), row)
            if isinstance(sample, list) or not sample["input_ids"]:
                return self.report.drop("has a text without tokens", place, "", row)
        samples = [list(sample["input_ids"]) for sample in encoded if isinstance(sample, dict)]
        flat = [token for ids in samples for token in ids]
        self.row_indices.append(number)
        return self.store.append({"input_ids": flat, "sizes": [len(ids) for ids in samples], **group.facts})

    def content_hash(self) -> str:
        return self.store.content_hash()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Json:
        return self.store[index]

    def __iter__(self) -> Iterator[Json]:
        return iter(self.store)


def parts_of(item: Json) -> list[list[int]]:
    """The token ids of each sample of a group."""
    ends = list(accumulate(item["sizes"]))
    return [item["input_ids"][end - size : end] for size, end in zip(item["sizes"], ends, strict=True)]


def samples_of(items: Sequence[Json]) -> list[Json]:
    """The samples of groups as rows for a template, without labels."""
    return [{"input_ids": ids, "labels": [-100] * len(ids)} for item in items for ids in parts_of(item)]


def group_facts(items: Sequence[Json]) -> dict[str, Tensor]:
    """What losses are told of the samples of R groups besides their tokens.

    Returns: `groups` int64 [B], to which one each sample belongs, from 0 on. For embeddings `roles` [B], see Vectors, and
    `pair_labels` [R] (NaN: none); for rerankers `relevant` [B].
    """
    counts = [len(item["sizes"]) for item in items]
    facts = {"groups": torch.repeat_interleave(torch.arange(len(items)), torch.tensor(counts, dtype=torch.int64))}
    if items and "relevant" in items[0]:
        return {**facts, "relevant": torch.tensor([value for item in items for value in item["relevant"]])}
    roles = [role for count in counts for role in (ANCHOR, POSITIVE, *[NEGATIVE] * (count - 2))]
    labels = torch.tensor([item.get("label", float("nan")) for item in items])
    return {**facts, "roles": torch.tensor(roles, dtype=torch.int64), "pair_labels": labels}


def judging_tokens(args: TaskArguments, template: Template) -> tuple[int, int]:
    """Numbers of the words by which a generative reranker agrees and disagrees.

    Raises: UsageError for a word that is not one token.
    """
    words = args.generative_reranker_positive_token, args.generative_reranker_negative_token
    found = [template.tokenize(word) for word in words]
    for flag, word, ids in zip(JUDGING_WORDS, words, found, strict=True):
        if len(ids) != 1:
            raise UsageError(f"--{flag} {word}: is {len(ids)} tokens of this model; choose a word that is one")
    return found[0][0], found[1][0]


def load_groups(args: SftArguments, template: Template) -> tuple[GroupDataset, GroupDataset | None]:
    """(training groups, validation groups or None). Raises: UsageError without data; DatasetError."""
    grouping = Grouping.of(args, args.loss_type or args.loss_types[0])

    def make(rows: list[Row], rejects: RejectsFile | None, name: str) -> GroupDataset:
        return GroupDataset(
            rows, template, grouping, max_drop_ratio=args.max_drop_ratio, name=name, num_proc=args.dataset_num_proc,
            rejects=rejects,
        )  # fmt: skip

    train, val = made_of_rows(args, make)
    if args.task_type == "generative_reranker":
        train.words = judging_tokens(args, template)
    return train, val
