"""The rows of a preview: encoded as a command encodes them, their tokens, and what they say beside their text."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from swiftlite.arguments.preview import PreviewArguments
from swiftlite.llm.dataset.classes import label_text, names_of, values_of
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.groups import GroupDataset, Grouping, TextEncoder, samples_of
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.template.base import IGNORE_INDEX, Template
from swiftlite.utils.types import Json, Settings

_CLASSES = 20  # that are counted by name
PAIRED = ("dpo", "rm")  # what --rlhf_type trains on pairs of answers
Samples = EncodedDataset | PairDataset | GroupDataset


@dataclass(frozen=True)
class Token:
    """A token of a row: id, its text (of a character that is divided over tokens only the first has it), loss weight."""

    id: int
    text: str
    weight: float


@dataclass(frozen=True)
class Shown:
    """A conversation. row: its number, and which answer of a pair. told: how much is trained on; the label; the margin."""

    row: str
    tokens: list[Token]
    told: str


def tokens_of(template: Template, sample: Json, text: str | None = None) -> list[Token]:
    """The tokens of an encoded sample. text: what it was encoded from (default: what it decodes to); it gives divided
    characters their text."""
    ids = sample["input_ids"]
    weights = sample.get("loss_scale") or [float(label != IGNORE_INDEX) for label in sample["labels"]]
    texts: list[str] | None = None
    text = str(template.tokenizer.decode(ids)) if text is None else text
    if getattr(template.tokenizer, "is_fast", False):
        whole = template.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(whole["input_ids"]) == ids:
            reached, texts = 0, []
            for _, end in whole["offset_mapping"]:
                texts.append(text[reached : max(reached, end)])
                reached = max(reached, end)
    if texts is None:
        texts = [str(template.tokenizer.decode([token])) for token in ids]
    return [Token(*values) for values in zip(ids, texts, weights, strict=True)]


def encoded(args: PreviewArguments, rows: Sequence[Json], template: Template, rejects: RejectsFile) -> Samples:
    """Samples, or pairs of answers or groups where they are trained on. Raises: DatasetError where no row can be used."""
    settings: Settings = {"max_drop_ratio": 1.0, "name": "data", "num_proc": args.dataset_num_proc, "rejects": rejects}
    if args.groups:
        return GroupDataset(rows, template, Grouping.of(args, str(args.loss_type)), **settings)
    return (PairDataset if args.rlhf_type in PAIRED else EncodedDataset)(rows, template, **settings)


def lengths_of(samples: Samples) -> list[int]:
    """Tokens of each sample, of groups of each text."""
    if isinstance(samples, GroupDataset):
        return [size for group in samples for size in group["sizes"]]
    return list(samples.lengths)


def read_as_a_whole(args: PreviewArguments) -> bool:
    """Does a number of a head say something of the conversation, so that no token has a loss of its own?"""
    return args.pools or args.rlhf_type == "rm"


def shown_of(args: PreviewArguments, template: Template, samples: Samples, i: int, row: Json) -> Iterator[Shown]:
    """Sample `i`, made of `row`; of a pair both answers, of a group each text."""
    number = str(samples.row_indices[i])
    if isinstance(samples, GroupDataset):
        said = _judged(samples[i])
        yield from (Shown(number, tokens_of(template, text), next(said)) for text in samples_of([samples[i]]))
        return
    parts: list[tuple[str, Json, Json]] = [(number, samples[i], row)]
    if isinstance(samples, PairDataset):
        others = {"chosen": row, "rejected": {**row, "messages": row["rejected_messages"]}}
        parts = [(f"{number}, {side}", samples.pair(i)[side], other) for side, other in others.items()]
    for name, sample, part in parts:
        if read_as_a_whole(args):
            sample = {**sample, "labels": [IGNORE_INDEX] * len(sample["input_ids"])}
        tokens = tokens_of(template, sample, template.training_text(part)[0])
        told = f"{sum(token.weight > 0 for token in tokens)} trained on"
        if args.reads_labels:
            told = f"label {label_text(row['label'], _names(args))}"
        elif args.rlhf_type == "rm":
            told = f"margin {row['margin']:g}" if "margin" in row else "no margin"
        yield Shown(name, tokens, told)


def _judged(group: Json) -> Iterator[str]:
    """What the loss takes each text of a group for."""
    if "relevant" in group:
        yield from (f"relevant {value:g}" for value in group["relevant"])
        return
    yield "anchor"
    yield f"positive, label {group['label']:g}" if "label" in group else "positive"
    yield from itertools.repeat("negative")


def told_of(args: PreviewArguments, template: Template, samples: Samples) -> Iterator[str]:
    """How rows are written, and how many there are."""
    cut = f"max length {template.max_length}, truncation {args.truncation_strategy}"
    written = f"template {template.template_type} ({template.template_backend})"
    if isinstance(samples, GroupDataset):
        lengths = lengths_of(samples)
        yield f"{'plain text' if TextEncoder.of(template, samples.task_type) else written}, {cut}"
        yield f"{len(samples)} groups of {len(lengths)} texts, {sum(lengths)} tokens; the last token of a text is judged"
        return
    yield f"{written}, loss scale {args.loss_scale}, {cut}"
    counted = f"{len(samples)} {'pairs' if args.rlhf_type in PAIRED else 'samples'}, {sum(samples.lengths)} tokens"
    yield counted + ("" if read_as_a_whole(args) else f", {_trained_share(samples):.1%} of them with a loss")


def told_beside(args: PreviewArguments, rows: Sequence[Json]) -> Iterator[str]:
    """What rows say beside their text, counted."""
    if args.rlhf_type == "kto":
        good = sum(row["label"] for row in rows)
        yield f"{good} desirable, {len(rows) - good} undesirable answers"
    elif args.rlhf_type == "rm":
        margins = [row["margin"] for row in rows if "margin" in row]
        extent = f", from {min(margins):g} to {max(margins):g}" if margins else ""
        yield f"{len(margins)} of {len(rows)} pairs have a margin{extent}"
    elif args.reads_labels and args.problem_type == "regression":
        numbers = [number for row in rows for number in values_of(row["label"])]
        yield f"labels from {min(numbers):g} to {max(numbers):g}, mean {sum(numbers) / len(numbers):g}"
    elif args.reads_labels:
        classes = range(args.num_labels or 0)
        counts = Counter(label for row in rows for label in values_of(row["label"]))
        shown = [f"{label_text(label, _names(args))}: {counts[label]}" for label in classes[:_CLASSES]]
        yield f"rows of each class: {', '.join(shown + ['...'] * (len(classes) > _CLASSES))}"


def _names(args: PreviewArguments) -> list[str]:
    return names_of((args.model_info.config or {}).get("id2label"), args.num_labels or 0)


def _trained_share(samples: EncodedDataset | PairDataset) -> float:
    answers = map(samples.sequence, range(2 * samples.pairs)) if isinstance(samples, PairDataset) else samples
    trained = sum(label != IGNORE_INDEX for sample in answers for label in sample["labels"][1:])
    return trained / max(1, sum(samples.lengths))
