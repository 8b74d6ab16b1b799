"""Micro batches of preference pairs.

Shapes: P pairs of a micro batch, B rows (2P answers, or 1 where they are joined), S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftlite.llm.dataset.pairs import PairDataset, sequences_of
from swiftlite.megatron.context import add_up, ranks
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.train.dpo_loss import LogProbs, sum_log_probs
from swiftlite.train.router_loss import PADDING
from swiftlite.utils.types import Json


@dataclass(kw_only=True)
class PairBatch(MicroBatch):
    """All chosen answers of a micro batch, then all rejected ones.

    num_answers: 2P. sequence_ids: int64 [B, S], which answer a position belongs to, 2P for none. reference: [2P]
    log-probabilities under the reference, None while they are not known.
    """

    num_answers: int
    sequence_ids: Tensor
    reference: Tensor | None = None

    def log_probs(self, losses: Tensor) -> LogProbs:
        """Of the answers, from the cross entropy of each position [B, S]."""
        found = sum_log_probs(losses, self.loss_mask, self.sequence_ids, self.num_answers + 1)
        return LogProbs(add_up(found.sums[:-1]), add_up(found.tokens[:-1]))

    def counts(self) -> Tensor:
        """[pairs, tokens of the chosen answers]: this rank's share, of ranks that hold parts of the same samples."""
        pairs = self.num_answers // 2
        chosen = (self.loss_mask * (self.sequence_ids < pairs)).sum()
        return torch.stack([chosen.new_full((), pairs / ranks()), chosen])


class PairLoader(BatchLoader):
    """Makes the micro batches of a step from a PairDataset."""

    dataset: PairDataset

    def rows(self, samples: Sequence[int]) -> list[Json]:
        there = [self.dataset[i] for i in samples if i >= 0]
        return sequences_of(there) + 2 * super().rows([i for i in samples if i < 0])

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> PairBatch:
        pairs = [pair for i in samples if i >= 0 for pair in self.dataset.items[i]]
        assert batch.sequences is not None
        ids = torch.where(batch.sequences == PADDING, 2 * len(pairs), batch.sequences).clamp(max=2 * len(pairs))
        known = self.dataset.reference
        reference = None if known is None else torch.tensor([known[p][side] for side in (0, 1) for p in pairs])
        return PairBatch(**vars(batch), num_answers=2 * len(pairs), sequence_ids=ids, reference=reference)
