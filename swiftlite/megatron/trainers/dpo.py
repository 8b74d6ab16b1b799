"""`swiftlite megatron dpo` (`megatron rlhf --rlhf_type dpo`): direct preference optimisation on megatron-core.

The reference is the model as training began, --ref_model, or with LoRA the model with its adapters off.
Shapes: P pairs of a micro batch, B rows (2P answers, or 1 where they are joined), S tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossFunction, LossResult, reduce_over_ranks, token_losses
from swiftlite.megatron.trainers.pairs import PairBatch, PairLoader
from swiftlite.megatron.trainers.reference import build_reference, reference_of
from swiftlite.megatron.trainers.run import run
from swiftlite.megatron.tuners.lora import adapters_disabled
from swiftlite.train.batches import evaluation_samples
from swiftlite.train.checkpoints import Start
from swiftlite.train.dpo_loss import SUMS, LogProbs
from swiftlite.train.reference import pair_loss
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()


class DpoTrainer(Trainer):
    """The loss of pairs, a mean over those of the global batch; see PairLoss."""

    loader = PairLoader
    sums = SUMS
    train_loader: PairLoader
    val_loader: PairLoader | None

    def __init__(self, args: MegatronDpoArguments, *rest: Any) -> None:
        super().__init__(args, *rest)
        self.pair_loss = pair_loss(args)
        self.references = int(args.has_reference and not args.precompute_ref_log_probs)
        self.reference_dir, self.reference_args = reference_of(args, self.origin_dir)
        self.reference: list[
            MegatronModule
        ] = []  # its model chunks; none where adapters are switched off, or all is known
        self.global_counts: Tensor

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.pair_loss.metrics(sums)

    # ---- the reference ----

    def load(self, start: Start | None) -> int:
        done = super().load(start)
        if self.reference_args is not None:
            self.reference = build_reference(self.reference_args, self.reference_dir, self.variable_lengths)
        if self.args.has_reference:
            logger.info("the reference is %s", self.reference_dir)
        if self.args.precompute_ref_log_probs:
            self.precompute(self.train_loader)
            if self.val_loader is not None:
                self.precompute(self.val_loader)
            self.reference = []
        return done

    @contextmanager
    def answering(self) -> Iterator[list[MegatronModule]]:
        """The reference's model chunks: its own, or the policy's without adapters and dropout."""
        if self.reference:
            yield self.reference
            return
        training = self.models[0].training
        with adapters_disabled(self.models):
            for model in self.models:
                model.eval()
            try:
                yield self.models
            finally:
                for model in self.models:
                    model.train(training)

    @torch.no_grad()
    def answer(self, batches: Sequence[PairBatch]) -> None:
        """Fill in the reference's log-probabilities, on the last stage, unless they are known. Collective."""
        if self.args.has_reference and batches[0].reference is None:
            with self.answering() as models:
                results = self.passes(models, list(batches), self.reference_step, forward_only=True)
            for batch, result in zip(batches, results, strict=False):
                batch.reference = result["log_probs"]

    @staticmethod
    def reference_step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)

        def report(losses: Tensor) -> LossResult:
            found = batch.log_probs(losses)
            return losses.sum(), found.tokens.sum().int(), {"log_probs": found.sums}

        return token_losses(model, batch), report

    def precompute(self, loader: PairLoader) -> None:
        """Keep the reference's log-probabilities of a whole dataset; data-parallel ranks share the work. Collective."""
        pairs = loader.dataset.pairs
        single = copy.copy(loader)
        single.dataset = loader.dataset.singles()
        values = torch.zeros(2, pairs, device=self.device)
        for samples in evaluation_samples(pairs, self.run.global_batch):
            mine = self.run.plan.micro_batches(samples)
            batches: list[Any] = single.load(mine)
            self.answer(batches)
            for indices, batch in zip(mine, batches, strict=True):
                there = [i for i in indices if i >= 0]
                if batch.reference is not None and self.parallel.cp_rank == 0:
                    values[:, there] = batch.reference.view(2, len(there))
        chosen, rejected = reduce_over_ranks(values).tolist()
        loader.dataset.reference = list(zip(chosen, rejected, strict=True))
        logger.info("the reference answered %d pairs", pairs)

    # ---- a step ----

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

    def forward_step(self, batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        return token_losses(model, batch), partial(self.loss, batch)

    def loss(self, batch: PairBatch, losses: Tensor) -> LossResult:
        """The schedule divides by the pairs of the global batch, so this is that many times a share of the loss."""
        policy = batch.log_probs(losses)
        reference = None if batch.reference is None else LogProbs(batch.reference, policy.tokens)
        sums = self.pair_loss.sums(policy, reference)
        pairs, chosen_tokens = self.global_counts
        share = self.pair_loss.total(sums["loss"], pairs, sums["nll"], chosen_tokens)
        if self.parallel.cp_rank:  # of ranks that share samples, and compute one loss, the first one reports it
            sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        return share * pairs, sums["pairs"].int(), {name: value.detach() for name, value in sums.items()}


def megatron_dpo_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """Train on preference pairs; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    return run(as_arguments(MegatronDpoArguments, args), DpoTrainer, load_pairs)
