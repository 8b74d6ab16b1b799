"""The engine of preference training on megatron-core: a reference beside the trained model answers what that answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.llm.dataset.reference import cached_answers
from swiftlite.megatron.trainers.base import Trainer, evaluating
from swiftlite.megatron.trainers.loss import LossFunction, LossResult, reduce_over_ranks, token_losses
from swiftlite.megatron.trainers.pairs import AnswerBatch, AnswerLoader
from swiftlite.megatron.trainers.reference import build_reference, reference_of
from swiftlite.megatron.tuners.lora import adapters_disabled
from swiftlite.train.batches import evaluation_samples
from swiftlite.train.checkpoints import Start
from swiftlite.train.loop import Run
from swiftlite.train.questions import Questions, asked
from swiftlite.utils.logger import get_logger

logger = get_logger()


class ReferenceTrainer(Trainer):
    """The engine with a reference next to the model, or with what that said before training."""

    args: MegatronDpoArguments

    def setup(self, run: Run) -> None:
        self.references = int(self.args.has_reference and not self.args.precompute_ref_log_probs)
        self.reference_dir, self.reference_args = reference_of(self.args, self.origin_dir)
        # Its model chunks; none where adapters are switched off, or all is known.
        self.reference: list[MegatronModule] = []
        super().setup(run)

    def load(self, start: Start | None) -> int:
        done = super().load(start)
        if self.reference_args is not None:
            self.reference = build_reference(self.reference_args, self.reference_dir, self.variable_lengths)
        if self.args.has_reference:
            logger.info("the reference is %s", self.reference_dir)
        if self.args.precompute_ref_log_probs:
            for questions in asked(self.run):
                questions.remember(cached_answers(questions, self.args, partial(self.ask, questions)))
            self.reference = []
        return done

    @contextmanager
    def answering(self) -> Iterator[list[MegatronModule]]:
        """The reference's model chunks: its own, or the policy's without adapters and dropout."""
        if self.reference:
            yield self.reference
            return
        with adapters_disabled(self.models), evaluating(self.models):
            yield self.models

    @torch.no_grad()
    def answer(self, batches: Sequence[AnswerBatch]) -> None:
        """Fill in the reference's log-probabilities, on the last stage, unless they are known. Collective."""
        if self.args.has_reference and batches[0].reference is None:
            with self.answering() as models:
                results = self.passes(models, list(batches), self.answer_step, forward_only=True)
            for batch, result in zip(batches, results, strict=False):
                batch.reference = result["log_probs"]

    @staticmethod
    def answer_step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """What a pass reports whose answers' log-probabilities are wanted."""
        batch = next(batches)

        def report(losses: Tensor) -> LossResult:
            found = batch.log_probs(losses)
            return losses.sum(), found.tokens.sum().int(), {"log_probs": found.sums}

        return token_losses(model, batch), report

    def ask(self, questions: Questions[object]) -> list[float]:
        """What the reference says to all of them; data-parallel ranks share the work. Collective."""
        plan, count = self.run.plan, len(questions)
        loader = AnswerLoader.of(
            questions, self.args, self.parallel, plan.micro_batch_size, self.pad_token_id, self.device
        )
        values = torch.zeros(count, device=self.device)
        for samples in evaluation_samples(count, self.run.global_batch):
            mine = plan.micro_batches(samples)
            batches: list[Any] = loader.load(mine)
            self.answer(batches)
            for indices, batch in zip(mine, batches, strict=True):
                if batch.reference is not None and self.parallel.cp_rank == 0:
                    values[[int(i) for i in indices if i >= 0]] = batch.reference
        found: list[float] = reduce_over_ranks(values).tolist()
        return found

    def forward_step(self, batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        return token_losses(model, batch), partial(self.loss, batch)

    def loss(self, batch: Any, losses: Tensor) -> LossResult:
        """What the schedule takes of a micro batch, from the cross entropy of each position [B, S]."""
        raise NotImplementedError

    def reported(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of ranks that share samples, and compute one loss, the first one reports it."""
        return {n: torch.zeros_like(v) if self.parallel.cp_rank else v.detach() for n, v in sums.items()}
