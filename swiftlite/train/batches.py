"""Which samples a rank trains on in each pass, and batches of the next step that are made while the device computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from swiftlite.train.order import SampleOrder, StreamOrder

DUMMY = -1  # stands for a sample that is not there: it fills up the last batch of an evaluation

B = TypeVar("B")


class Neighbour(int):
    """A sample of a global batch that knows the one before it there; before the first one stands the last."""

    before: int


def neighbours(samples: Sequence[int]) -> list[int]:
    """The same samples, those that are there as Neighbours."""
    there = [Neighbour(i) for i in samples if i != DUMMY]
    for sample, before in zip(there, [*there[-1:], *there[:-1]], strict=True):
        sample.before = before
    return [*there, *([DUMMY] * (len(samples) - len(there)))]


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a global batch are divided: `num_microbatches` passes of `micro_batch_size` on each DP rank."""

    micro_batch_size: int
    num_microbatches: int
    dp_rank: int
    dp_size: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    def micro_batches(self, samples: Sequence[int]) -> list[list[int]]:
        """This rank's samples of a global batch, one list per pass, as Neighbours. Ranks get equally many in every pass."""
        samples, per_pass = neighbours(samples), self.micro_batch_size * self.dp_size
        start = self.dp_rank * self.micro_batch_size
        return [
            samples[begin + start : begin + start + self.micro_batch_size] for begin in range(0, len(samples), per_pass)
        ]


def evaluation_samples(num_samples: int, global_batch_size: int, num_batches: int = -1) -> Iterator[list[int]]:
    """Global batches over a validation set, the last one filled up with samples that count for nothing.

    num_batches: stop after so many, -1: the whole set.
    """
    total = -(-num_samples // global_batch_size)
    for batch in range(total if num_batches < 0 else min(total, num_batches)):
        samples = list(range(batch * global_batch_size, min((batch + 1) * global_batch_size, num_samples)))
        yield samples + [DUMMY] * (global_batch_size - len(samples))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From pageable memory, a copy would wait until the device has come to it."""
    there = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return there.to(device, non_blocking=True)


class StepBatches(Generic[B]):
    """This rank's batches, step by step.

    Args: load: samples of each pass -> the step's batches, on the device. steps: of the run.
    """

    def __init__(
        self,
        plan: BatchPlan,
        order: SampleOrder | StreamOrder,
        steps: int,
        load: Callable[[list[list[int]]], B],
        device: torch.device,
    ) -> None:
        self.plan, self.order = plan, order
        self.load = load
        self.end = steps * plan.global_batch_size
        # A stream's place stays with the step; a CPU has nothing to do meanwhile.
        self._looks_ahead = device.type == "cuda" and isinstance(order, SampleOrder)
        self._ahead: tuple[int, B] | None = None

    def take(self, start: int) -> tuple[B, float]:
        """(batches of the step that begins with sample `start`, seconds that this took)."""
        began = time.perf_counter()
        early, self._ahead = self._ahead, None
        batches = early[1] if early and early[0] == start else self._make(start)
        return batches, time.perf_counter() - began

    def look_ahead(self, start: int) -> None:
        """Make the batches of the step that begins with sample `start`, unless they are there or the run ends before."""
        if self._looks_ahead and self._ahead is None and start < self.end:
            self._ahead = start, self._make(start)

    def _make(self, start: int) -> B:
        return self.load(self.plan.micro_batches(self.order.slice(start, start + self.plan.global_batch_size)))
