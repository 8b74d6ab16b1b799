"""`swiftlite megatron rlhf --rlhf_type kto`: training on answers that are each desirable or not, on megatron-core.

The reference is as in dpo.py; what the loss compares with is as on the other side, see llm/train/kto.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.answers import load_answers
from swiftlite.megatron.context import ranks
from swiftlite.megatron.trainers.base import evaluating
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossResult, reduce_over_ranks
from swiftlite.megatron.trainers.pairs import AnswerBatch, ComparingLoader, LabelledBatch, LabelledLoader
from swiftlite.megatron.trainers.run import run as run_trainer
from swiftlite.megatron.trainers.with_reference import ReferenceTrainer
from swiftlite.train.dpo_loss import LogProbs
from swiftlite.train.kto_loss import SUMS, KtoLoss
from swiftlite.train.loop import Run
from swiftlite.train.reference import kto_loss
from swiftlite.utils.types import Json


class KtoTrainer(ReferenceTrainer):
    """The loss of single answers, a mean over those of the global batch; see KtoLoss."""

    sums = SUMS

    kl: Tensor
    answers: Tensor  # of the global batch

    @cached_property
    def kto_loss(self) -> KtoLoss:
        return kto_loss(self.args)

    def setup(self, run: Run) -> None:
        self.loader = ComparingLoader if self.kto_loss.compares else LabelledLoader
        super().setup(run)
        if self.kto_loss.compares:
            self.references = 2 * self.references + 1  # policy and reference answer mismatched prompts as well

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.kto_loss.metrics(sums)

    def run_batches(self, batches: list[MicroBatch], forward_only: bool) -> Tensor:
        labelled = cast("list[LabelledBatch]", batches)
        self.answer(labelled)
        self.kl = self.measure(labelled)
        self.answers = torch.tensor(sum(b.num_answers for b in labelled) / ranks(), device=self.device)
        torch.distributed.all_reduce(self.answers, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return super().run_batches(batches, forward_only)

    @torch.no_grad()
    def measure(self, batches: Sequence[LabelledBatch]) -> Tensor:
        """How far the policy is from the reference in the global batch, on the last stage and all others. Collective."""
        scores = torch.zeros(2, dtype=torch.float64, device=self.device)  # their sum and number
        if self.kto_loss.compares:
            others = [cast(AnswerBatch, batch.mismatched) for batch in batches]
            self.answer(others)
            with evaluating(self.models):
                results = self.passes(self.models, list(others), self.answer_step, forward_only=True)
            for other, result in zip(others, results, strict=False):
                assert other.reference is not None
                found = result["log_probs"] - other.reference
                scores += torch.stack([found.double().sum(), scores.new_tensor(len(found))])
            scores = reduce_over_ranks(scores * (self.parallel.cp_rank == 0))
        return self.kto_loss.kl(*scores).float()

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        return self.answers

    def loss(self, batch: LabelledBatch, losses: Tensor) -> LossResult:
        """The schedule divides by the answers of the global batch."""
        policy = batch.log_probs(losses)
        assert batch.reference is not None
        sums = self.kto_loss.sums(policy, LogProbs(batch.reference, policy.tokens), batch.desirable, self.kl)
        loss, sums = sums["loss"], self.reported(sums)
        return loss, sums["answers"].int(), sums


def megatron_kto_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """Train on labelled answers; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    return run_trainer(as_arguments(MegatronDpoArguments, args), KtoTrainer, load_answers)
