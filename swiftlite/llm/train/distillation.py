"""Distillation with transformers: the objective, batches with what a teacher said before, the engine with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from swiftlite.llm.dataset.teacher import TeacherLogits
from swiftlite.llm.template.collate import IGNORE_INDEX
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.plan.memory import DIVERGENCE_LOGITS
from swiftlite.train.batches import to_device
from swiftlite.train.checkpoints import Start
from swiftlite.train.distill_loss import Divergence, Top, in_chunks
from swiftlite.train.loop import Run
from swiftlite.train.objective import Batch, LanguageModeling
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template

TOLD = ("told_ids", "told_log_probs", "told_rest")
_NOT_INPUTS = ("labels", "loss_scale", "told", *TOLD)


class Distillation(LanguageModeling):
    """Divergence from the teacher + sft_alpha x cross entropy, means over the tokens with a label.

    teacher: None: batches say what it thinks, see TaughtCollator. rows: of the vocabulary that both models have.
    """

    def __init__(self, loss: Divergence, teacher: PreTrainedModel | None, rows: int, sft_alpha: float) -> None:
        super().__init__()
        self.divergence, self.teacher = loss, teacher
        self.rows, self.sft_alpha = rows, sft_alpha

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        targets = batch["labels"][:, 1:]
        there = targets != IGNORE_INDEX
        inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
        student, labels = self._logits(model, inputs, there), targets[there]
        distances = self._distances(inputs, batch, there)

        def terms(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            entropies = cross_entropy(logits.float(), labels[rows], reduction="none")
            return distances(logits[:, : self.rows], rows) + self.sft_alpha * entropies, entropies

        losses, entropies = in_chunks(terms, student, DIVERGENCE_LOGITS)
        if "loss_scale" in batch:
            losses, entropies = (values * batch["loss_scale"][:, 1:][there] for values in (losses, entropies))
        return {"loss": losses.sum(), "nll": entropies.sum(), "trained_tokens": there.sum()}

    def _distances(self, inputs: Batch, batch: Batch, there: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Of some rows of the student's logits [N, V]."""
        if self.teacher is None:
            told = Top(*(batch[name] for name in TOLD))[batch["told"][:, 1:][there]].within(self.rows)
            return lambda student, rows: self.divergence.of_top(student, told[rows])
        with torch.no_grad():
            teacher = self._logits(self.teacher, inputs, there)[:, : self.rows]
        return lambda student, rows: self.divergence(student, teacher[rows])

    def _logits(self, model: torch.nn.Module, inputs: Batch, there: Tensor) -> Tensor:
        """[N, V] of the positions before tokens with a label."""
        logits: Tensor = model(**inputs).logits
        return logits[:, : there.shape[1]][there]

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {**super().metrics(sums), "nll_loss": sums["nll"] / max(sums["trained_tokens"], 1.0)}


class TaughtCollator:
    """Rows as the template joins them, with what the teacher thinks of their tokens: `told` [B, S] says which entry of
    TOLD (see Top) belongs to a token with a label."""

    def __init__(self, template: Template, teacher: TeacherLogits) -> None:
        self.template, self.teacher = template, teacher

    def __call__(self, rows: Sequence[Json]) -> Batch:
        batch: Batch = self.template.data_collator(rows)
        top = self.teacher.of(rows)
        labels = batch["labels"]
        batch["told"] = ((labels != IGNORE_INDEX).flatten().cumsum(0) - 1).view_as(labels)  # row by row, as in `top`
        batch.update(zip(TOLD, (top.ids, top.log_probs, top.rest), strict=True))
        return batch


class GkdTrainer(HfTrainer):
    """The engine with a teacher next to the model, or with what that said before."""

    objective: Distillation

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.references = int(self.objective.teacher is not None)

    def inputs(self, batch: Batch) -> Batch:
        """Ranks that share sequences all get the whole of what the teacher said."""
        told = {name: to_device(value, self.device) for name, value in batch.items() if name in TOLD}
        return {**super().inputs({name: value for name, value in batch.items() if name not in TOLD}), **told}

    def load(self, start: Start | None) -> int:
        done = super().load(start)
        if self.objective.teacher is not None:
            self.place(self.objective.teacher)
            if self.parts is not None:
                self.parts.install(self.objective.teacher)
        return done
