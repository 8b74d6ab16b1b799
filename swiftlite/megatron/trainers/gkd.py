"""`swiftlite megatron rlhf --rlhf_type gkd`: distillation on megatron-core, off-policy; see llm/train/gkd.py.

The teacher answers all micro batches of a step before the student runs: of each position with a label its logits are kept,
of this rank's rows of the vocabulary. Or batches have what it said before (--teacher_logits).
Shapes: B rows, S tokens, N positions with a label, V rows on this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.taught import load_taught
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossFunction, LossResult, token_outputs
from swiftlite.megatron.trainers.reference import build_reference, other_model
from swiftlite.megatron.trainers.run import run as run_trainer
from swiftlite.megatron.trainers.sft import SftTrainer
from swiftlite.megatron.trainers.taught import TaughtBatch, TaughtLoader
from swiftlite.plan.memory import DIVERGENCE_LOGITS
from swiftlite.train.checkpoints import Start
from swiftlite.train.distill_loss import Divergence, Parts, in_chunks
from swiftlite.train.loop import Run
from swiftlite.train.order import Data
from swiftlite.train.reference import divergence
from swiftlite.utils.types import Json


def _largest(values: Tensor) -> Tensor:
    values = values.clone()
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=mpu.get_tensor_model_parallel_group())
    return values


PARTS = Parts(reduce_from_tensor_model_parallel_region, copy_to_tensor_model_parallel_region, _largest)


class GkdTrainer(SftTrainer):
    """The divergence from a teacher + sft_alpha x cross entropy, means over the tokens of the global batch."""

    sums = ("loss", "nll", "trained_tokens")

    args: MegatronDpoArguments
    known_rows: int | None = None  # of the vocabulary of a teacher that has answered before

    @cached_property
    def divergence(self) -> Divergence:
        return divergence(self.args)

    def see(self, data: Data) -> None:
        super().see(data)
        known = getattr(data[0], "teacher", None)
        if known is not None:
            self.loader, self.known_rows = TaughtLoader, known.rows

    def setup(self, run: Run) -> None:
        self.references = int(self.known_rows is None)
        self.teacher: list[MegatronModule] = []
        self.taught: dict[int, Tensor] = {}  # id of a micro batch -> logits [N, V]
        if self.known_rows is None:
            other = copy.copy(self.args)
            other.adapters, other.mcore_adapter = [], None
            named = str(self.args.teacher_model)
            self.teacher_dir, self.teacher_args = other_model(self.args, other, "teacher_model", named, self.origin_dir)
        super().setup(run)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {**super().metrics(sums), "nll_loss": sums["nll"] / max(sums["trained_tokens"], 1.0)}

    def load(self, start: Start | None) -> int:
        done = super().load(start)
        if self.known_rows is None:
            self.teacher = build_reference(self.teacher_args, self.teacher_dir, self.variable_lengths)
        return done

    def run_batches(self, batches: list[MicroBatch], forward_only: bool) -> Tensor:
        if self.known_rows is not None:
            return super().run_batches(batches, forward_only)
        with torch.no_grad():
            answers = self.passes(self.teacher, batches, self.teach, forward_only=True)
        self.taught = {id(batch): answer["logits"] for batch, answer in zip(batches, answers, strict=False)}
        try:
            return super().run_batches(batches, forward_only)
        finally:
            self.taught = {}

    def teach(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)

        def report(logits: Tensor) -> LossResult:
            zero = logits.new_zeros(())
            return zero, zero.int(), {"logits": logits[batch.loss_mask != 0]}

        return token_outputs(model, batch), report

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        return token_outputs(model, batch), partial(self.loss, batch)

    def loss(self, batch: MicroBatch, logits: Tensor) -> LossResult:
        there = batch.loss_mask != 0
        weights, labels = batch.loss_mask[there], batch.labels[there]
        distances = self.distances(batch, logits.shape[-1], there)

        def terms(student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            student = student.float()
            nll = vocab_parallel_cross_entropy(student.clone(), labels[rows])
            return distances(student, rows) + self.args.sft_alpha * nll, nll

        losses, nll = in_chunks(terms, logits[there], DIVERGENCE_LOGITS)
        total, count = (losses * weights).sum(), there.sum().int()
        sums = {"loss": total.detach().clone(), "nll": (nll * weights).sum(), "trained_tokens": count}
        return total, count, sums

    def distances(self, batch: MicroBatch, own: int, there: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Of some rows of the student's logits [N, V]. own: V."""
        rank = mpu.get_tensor_model_parallel_rank()
        known = self.args.description.padded_vocab_size or own
        if self.known_rows is not None:
            known = min(known, self.known_rows)
        used = max(1, min(own, known - rank * own))  # the others pad the vocabulary
        if isinstance(batch, TaughtBatch):
            top = batch.top[batch.told[there]].within(known)
            return lambda student, rows: self.divergence.of_top(student[:, :used], top[rows], PARTS, first=rank * own)
        teacher = self.taught[id(batch)][:, :used]
        return lambda student, rows: self.divergence(student[:, :used], teacher[rows], PARTS)


def megatron_gkd_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """Distil; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    return run_trainer(as_arguments(MegatronDpoArguments, args), GkdTrainer, load_taught)
