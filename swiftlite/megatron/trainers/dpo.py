"""`swiftlite megatron dpo` (`megatron rlhf --rlhf_type dpo`): direct preference optimisation on megatron-core.

Shapes: P pairs of a micro batch, B rows (2P answers, or 1 where they are joined), S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossResult
from swiftlite.megatron.trainers.pairs import PairBatch, PairLoader
from swiftlite.megatron.trainers.run import run
from swiftlite.megatron.trainers.with_reference import ReferenceTrainer
from swiftlite.train.dpo_loss import SUMS, LogProbs, PairLoss
from swiftlite.train.reference import pair_loss
from swiftlite.utils.types import Json


class DpoTrainer(ReferenceTrainer):
    """The loss of pairs, a mean over those of the global batch; see PairLoss."""

    loader = PairLoader
    sums = SUMS

    global_counts: Tensor

    @cached_property
    def pair_loss(self) -> PairLoss:
        return pair_loss(self.args)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.pair_loss.metrics(sums)

    def run_batches(self, batches: list[Any], forward_only: bool) -> Tensor:
        self.answer(batches)
        self.global_counts = self.count(batches)
        return super().run_batches(batches, forward_only)

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        return self.global_counts[0]

    def count(self, batches: list[Any]) -> Tensor:
        """[pairs, tokens of the chosen answers] of the global batch. Collective."""
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        torch.distributed.all_reduce(counts, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return counts

    def loss(self, batch: PairBatch, losses: Tensor) -> LossResult:
        """The schedule divides by the pairs of the global batch, so this is that many times a share of the loss."""
        policy = batch.log_probs(losses)
        reference = None if batch.reference is None else LogProbs(batch.reference, policy.tokens)
        sums = self.pair_loss.sums(policy, reference)
        pairs, chosen_tokens = self.global_counts
        share = self.pair_loss.total(sums["loss"], pairs, sums["nll"], chosen_tokens)
        sums = self.reported(sums)
        return share * pairs, sums["pairs"].int(), sums


def megatron_dpo_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """Train on preference pairs; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    return run(as_arguments(MegatronDpoArguments, args), DpoTrainer, load_pairs)
