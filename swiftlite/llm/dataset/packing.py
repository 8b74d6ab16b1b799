"""Packing: several samples in one sequence, chosen so that little room is left; each keeps its own positions."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.template.collate import join_rows
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.dataset.teacher import TeacherLogits

WINDOW = 10_000


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide samples into sequences of at most `capacity` tokens: best fit, longest first.

    Args: lengths: tokens of each sample, none above capacity.
    Returns: indices of the samples in each sequence; sequences and the samples in them ascending.
    """
    open_: list[tuple[int, int]] = []  # (room left, sequence), ascending
    sequences: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise UsageError(
                f"a sample of {length} tokens does not fit into sequences of {capacity}; lower --max_length"
            )
        at = bisect_left(open_, (length, -1))
        if at == len(open_):
            number, room = len(sequences), capacity
            sequences.append([])
        else:
            room, number = open_.pop(at)
        sequences[number].append(index)
        if room > length:
            insort(open_, (room - length, number))
    return sorted((sorted(sequence) for sequence in sequences), key=lambda sequence: sequence[0])


def pack_in_order(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide samples into sequences as they come: the next one begins with the sample that finds no room. As `pack`."""
    sequences: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            sequences.append([])
            room = capacity
        sequences[-1].append(index)
        room -= length
    return sequences


def pack_windows(lengths: Sequence[int], capacity: int, seed: int, window: int = WINDOW) -> list[list[int]]:
    """`pack` over windows of samples that are shuffled first, so that neighbours in the file do not stay together."""
    order = list(range(len(lengths)))
    random.Random(f"{seed}-packing").shuffle(order)
    sequences: list[list[int]] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        sequences += [[part[i] for i in packed] for packed in pack([lengths[i] for i in part], capacity)]
    return sequences


def joined(samples: Sequence[Json]) -> Json:
    """One sequence of samples end to end: positions start anew in each, `sample_lengths` are their tokens.

    Samples' own labels become a list under `label`.
    """
    row = join_rows(samples)
    if "label" in samples[0]:
        row["label"] = [sample["label"] for sample in samples]
    row["sample_lengths"] = [len(sample["input_ids"]) for sample in samples]
    row["length"] = len(row["input_ids"])
    row["channels"] = [sample.get("channel") for sample in samples]
    return row


class PackedDataset:
    """A dataset of packed sequences over an EncodedDataset.

    Attributes: sequences: samples of each. lengths: tokens of each. capacity. fill_rate: share of the room used.
    """

    is_packed = True
    teacher: TeacherLogits | None = None  # as an EncodedDataset's

    def __init__(
        self,
        dataset: EncodedDataset,
        capacity: int,
        seed: int = 42,
        sequences: list[list[int]] | None = None,
        name: str = "dataset",
        in_order: bool = False,
    ) -> None:
        self.dataset, self.capacity = dataset, capacity
        if sequences is None:
            lengths = dataset.lengths
            sequences = pack_in_order(lengths, capacity) if in_order else pack_windows(lengths, capacity, seed)
        self.sequences = sequences
        self.lengths = [sum(dataset.lengths[i] for i in sequence) for sequence in self.sequences]
        self.report = dataset.report
        get_logger().info(
            "%s: %d samples packed into %d sequences of %d tokens, fill rate %.1f %%",
            name, len(dataset), len(self.sequences), capacity, 100 * self.fill_rate,
        )  # fmt: skip

    @property
    def fill_rate(self) -> float:
        return sum(self.lengths) / max(1, len(self.lengths) * self.capacity)

    def content_hash(self) -> str:
        return self.dataset.store.content_hash(self.sequences)

    def extra_values(self, name: str) -> set[object]:
        return self.dataset.extra_values(name)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> Json:
        return joined([self.dataset[i] for i in self.sequences[index]])

    def __iter__(self) -> Iterator[Json]:
        return (self[i] for i in range(len(self)))
