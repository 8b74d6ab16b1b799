"""Micro batches of which only each sample's last token is judged: by a score head, or as a vector.

Shapes: B rows, S tokens, N samples, W numbers that the model gives for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.llm.model.heads import last_token
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.megatron.context import add_up, places, ranks
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.megatron.trainers.loss import LossFunction, LossResult, token_outputs
from swiftlite.utils.types import Json


@dataclass(kw_only=True)
class PooledBatch(MicroBatch):
    """ends: int64 [N], place in B x S of each sample's last token, see last_token. held: float [N], 1 where this rank of
    context parallelism has that token, 0 where another one has. targets: [N, ...], what the samples should give.
    """

    ends: Tensor
    held: Tensor
    targets: Tensor

    def part(self, size: int, rank: int) -> Self:
        mine = places(self.tokens.shape[1], self.cu_seqlens, size, rank)
        row, place = self.ends // self.tokens.shape[1], self.ends % self.tokens.shape[1]
        found = torch.searchsorted(mine, place).clamp(max=len(mine) - 1)
        part = super().part(size, rank)
        ends, held = row * len(mine) + found, (mine[found] == place).float()
        return replace(part, ends=ends, held=held, targets=self.targets)

    def pool(self, states: Tensor) -> Tensor:
        """[N, W] of [B, S, W]: those of the samples' last tokens."""
        return add_up(states.flatten(0, 1)[self.ends] * self.held.to(states)[:, None])


def pooled(batch: MicroBatch, samples: int, targets: Tensor, last: Callable[[Sequence[int]], int]) -> PooledBatch:
    """A whole micro batch with the ends of its first samples; those behind them count for nothing. last: which token of a
    sample is its end."""
    ids, sequences = batch.tokens.flatten().tolist(), batch.sequences
    assert sequences is not None
    places = torch.arange(len(ids)).view(batch.tokens.shape)
    found = (places[sequences == number].tolist() for number in range(samples))
    ends = [sample[last([ids[place] for place in sample])] for sample in found]
    return PooledBatch(
        **vars(batch), ends=torch.tensor(ends, dtype=torch.int64), held=torch.ones(samples), targets=targets
    )


class PooledLoader(BatchLoader):
    """Makes the micro batches of a step from samples."""

    def last(self, ids: Sequence[int]) -> int:
        """Which token of a sample counts."""
        return last_token(ids, self.pad_token_id)

    def targets(self, rows: Sequence[Json]) -> Tensor:
        """[N, ...]: what the samples in these rows should give."""
        raise NotImplementedError

    def rows(self, samples: Sequence[int]) -> list[Json]:
        """Those that are there first."""
        return super().rows(sorted(samples, key=lambda i: i < 0))

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> PooledBatch:
        there = [self.dataset[i] for i in samples if i >= 0]
        return pooled(batch, sum(len(sample_lengths(row)) for row in there), self.targets(there), self.last)


class PooledTrainer(Trainer):
    """A loss of what the model gives for last tokens: a mean over `counted`, one of `sums`, of the global batch."""

    counted: str

    def judge(self, batch: PooledBatch, outputs: Tensor) -> dict[str, Tensor]:
        """`sums` of one micro batch from outputs [N, W]; `loss` and what else is minimised have gradients."""
        raise NotImplementedError

    def pooled(self, batch: PooledBatch, outputs: Tensor) -> Tensor:
        """[N, W], the same on ranks that share samples, of what the model gives. Collective."""
        return batch.pool(outputs)

    def minimised(self, sums: dict[str, Tensor]) -> Tensor:
        """The sum of losses."""
        return sums["loss"]

    def count(self, batch: PooledBatch) -> float:
        """Of one micro batch, what the loss is a mean over."""
        return float(len(batch.ends))

    def divisor(self, batches: list[Any]) -> Tensor:
        here = sum(self.count(batch) for batch in batches) / ranks()
        total = torch.tensor(here, device=self.device)
        torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return total

    def forward_step(self, batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        return token_outputs(model, batch), partial(self.loss, batch)

    def loss(self, batch: PooledBatch, outputs: Tensor) -> LossResult:
        """The schedule divides by what is counted in the global batch, so this is a sum."""
        sums = self.judge(batch, self.pooled(batch, outputs))
        seen = {name: value.detach() for name, value in sums.items()}
        if self.parallel.cp_rank:  # of ranks that share samples, and compute one loss, the first one reports it
            seen = {name: torch.zeros_like(value) for name, value in seen.items()}
        return self.minimised(sums), seen[self.counted].int(), seen
