"""`swiftlite rlhf --rlhf_type gkd`: a student learns a teacher's next-token distributions on the answers of a dataset.

Off-policy: the answers are those of the data. Rows, packing, streaming and loss weights are as in sft.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_data
from swiftlite.llm.model.loader import embedding_rows
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.template.collate import IGNORE_INDEX, sample_lengths
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.reference import frozen, read_model
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.checkpoints import Start
from swiftlite.train.distill_loss import Divergence
from swiftlite.train.objective import Batch, LanguageModeling
from swiftlite.train.reference import check_teacher, divergence
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_INPUTS = ("labels", "loss_scale")


class Distillation(LanguageModeling):
    """Divergence from the teacher + sft_alpha x cross entropy, means over the tokens with a label.

    rows: of the vocabulary that both models have.
    """

    def __init__(self, loss: Divergence, teacher: PreTrainedModel, rows: int, sft_alpha: float) -> None:
        super().__init__()
        self.divergence, self.teacher = loss, teacher
        self.rows, self.sft_alpha = rows, sft_alpha

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        targets = batch["labels"][:, 1:]
        there = targets != IGNORE_INDEX
        inputs = {name: value for name, value in batch.items() if name not in _NOT_INPUTS}
        student = self._logits(model, inputs, there)
        with torch.no_grad():
            teacher = self._logits(self.teacher, inputs, there)
        losses = self.divergence(student, teacher)
        entropies = cross_entropy(student.float(), targets[there], reduction="none")
        if "loss_scale" in batch:
            losses, entropies = (values * batch["loss_scale"][:, 1:][there] for values in (losses, entropies))
        nll = entropies.sum()
        return {"loss": losses.sum() + self.sft_alpha * nll, "nll": nll.detach(), "trained_tokens": there.sum()}

    def _logits(self, model: torch.nn.Module, inputs: Batch, there: Tensor) -> Tensor:
        """[N, V] of the positions before tokens with a label."""
        logits: Tensor = model(**inputs).logits
        return logits[:, : there.shape[1], : self.rows][there]

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {**super().metrics(sums), "nll_loss": sums["nll"] / max(sums["trained_tokens"], 1.0)}


class GkdTrainer(HfTrainer):
    """The engine with a teacher next to the model."""

    objective: Distillation
    references = 1

    def load(self, start: Start | None) -> int:
        done = super().load(start)
        self.place(self.objective.teacher)
        if self.parts is not None:
            self.parts.install(self.objective.teacher)
        return done


def gkd_main(args: DpoArguments | Sequence[str]) -> Json:
    """Distil; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(DpoArguments, args)
    with started(args, load_data) as (model, template, data, start):
        teacher, tokenizer = read_model(args, str(args.teacher_model))
        rows = [embedding_rows(found) for found in (model, teacher)]
        check_teacher(args, template.tokenizer.get_vocab(), tokenizer.get_vocab(), rows)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        objective = Distillation(divergence(args), frozen(teacher), min(rows), args.sft_alpha)
        model = prepare_model(model, args)
        return run(GkdTrainer(args, model, template, objective, template.data_collator, sample_lengths), data, start)
