"""Micro batches of answers: preference pairs, or single answers that are each desirable or not.

Shapes: B rows (answers, or 1 where they are joined), S tokens, P pairs of a micro batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftlite.llm.dataset.answers import AnswerDataset, answers_of
from swiftlite.llm.dataset.pairs import PairDataset, sequences_of
from swiftlite.megatron.context import add_up, ranks
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.train.dpo_loss import LogProbs, sum_log_probs
from swiftlite.train.router_loss import PADDING
from swiftlite.utils.types import Json


@dataclass(kw_only=True)
class AnswerBatch(MicroBatch):
    """num_answers: A, in the rows' order. sequence_ids: int64 [B, S], which answer a position belongs to, A for none.
    reference: [A] log-probabilities under the reference, None while they are not known.
    """

    num_answers: int
    sequence_ids: Tensor
    reference: Tensor | None = None

    def log_probs(self, losses: Tensor) -> LogProbs:
        """Of the answers, from the cross entropy of each position [B, S]."""
        found = sum_log_probs(losses, self.loss_mask, self.sequence_ids, self.num_answers + 1)
        return LogProbs(add_up(found.sums[:-1]), add_up(found.tokens[:-1]))


class PairBatch(AnswerBatch):
    """All chosen answers of a micro batch, then all rejected ones; A is 2P."""

    def counts(self) -> Tensor:
        """[pairs, tokens of the chosen answers]: this rank's share, of ranks that hold parts of the same samples."""
        pairs = self.num_answers // 2
        chosen = (self.loss_mask * (self.sequence_ids < pairs)).sum()
        return torch.stack([chosen.new_full((), pairs / ranks()), chosen])


@dataclass(kw_only=True)
class LabelledBatch(AnswerBatch):
    """desirable: bool [A]. mismatched: the prompts with other answers, where the loss asks for them."""

    desirable: Tensor
    mismatched: AnswerBatch | None = None


class AnswerLoader(BatchLoader):
    """Makes the micro batches of a step from a dataset whose items are answers: {"input_ids", "labels", "reference"?}."""

    batch: type[AnswerBatch] = AnswerBatch
    per_sample = 1  # answers

    def answers(self, samples: Sequence[int]) -> list[Json]:
        return [self.dataset[i] for i in samples if i >= 0]

    def rows(self, samples: Sequence[int]) -> list[Json]:
        return self.answers(samples) + self.per_sample * super().rows([i for i in samples if i < 0])

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> AnswerBatch:
        rows = self.answers(samples)
        assert batch.sequences is not None
        ids = torch.where(batch.sequences == PADDING, len(rows), batch.sequences).clamp(max=len(rows))
        known = getattr(self.dataset, "reference", None)
        reference = torch.tensor([row["reference"] for row in rows]) if known else None
        return self.batch(**vars(batch), num_answers=len(rows), sequence_ids=ids, reference=reference)


class PairLoader(AnswerLoader):
    """From a PairDataset."""

    dataset: PairDataset
    batch = PairBatch
    per_sample = 2

    def answers(self, samples: Sequence[int]) -> list[Json]:
        return sequences_of(super().answers(samples))


class LabelledLoader(AnswerLoader):
    """From an AnswerDataset."""

    dataset: AnswerDataset

    def answers(self, samples: Sequence[int]) -> list[Json]:
        return answers_of(super().answers(samples))

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> LabelledBatch:
        good = [self.dataset.desirable[answer] for i in samples if i >= 0 for answer in self.dataset.items[i]]
        desirable = torch.tensor(good, dtype=torch.bool)
        return LabelledBatch(**vars(super().complete(samples, batch)), desirable=desirable)


class ComparingLoader(LabelledLoader):
    """The same with mismatched answers."""

    def load(self, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        batches = super().load(micro_batches)
        others = MismatchedLoader(
            self.dataset, self.pad_token_id, self.multiple_of, self.device, self.one_length, self.join, self.group,
            self.room, self.context,
        ).load(micro_batches)  # fmt: skip
        for batch, other in zip(batches, others, strict=True):
            assert isinstance(batch, LabelledBatch) and isinstance(other, AnswerBatch)
            batch.mismatched = other
        return batches


class MismatchedLoader(AnswerLoader):
    """From an AnswerDataset: its prompts with other answers."""

    def answers(self, samples: Sequence[int]) -> list[Json]:
        return [answer["mismatched"] for answer in answers_of(super().answers(samples))]
