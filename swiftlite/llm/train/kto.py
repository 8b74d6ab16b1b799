"""`swiftlite rlhf --rlhf_type kto`: training on answers that are each desirable or not, with transformers.

The reference is as in dpo.py. What the loss compares with, the policy's distance from the reference, is a mean over the
global batch: each prompt with the answer before its own there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.answers import answers_of, load_answers
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.preference import Compared, answers_batch
from swiftlite.llm.train.reference import ReferenceTrainer, reference_model
from swiftlite.llm.train.run import run as run_trainer
from swiftlite.train.kto_loss import KtoLoss
from swiftlite.train.loop import Run
from swiftlite.train.objective import Batch
from swiftlite.train.reference import kto_loss
from swiftlite.utils.dist import get_world_size
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template

_OTHER = "mismatched."


class AnswerCollator:
    """Items of an AnswerDataset -> one batch of `answers_batch` with desirable, bool [B].

    Mismatched answers, where the loss asks for them, are a batch of their own under names that begin with `mismatched.`.
    """

    def __init__(self, template: Template, compares: bool) -> None:
        self.template, self.compares = template, compares

    def __call__(self, items: Sequence[Json]) -> Batch:
        answers = answers_of(items)
        batch = answers_batch(self.template, answers)
        batch["desirable"] = torch.tensor([answer["desirable"] for answer in answers])
        if self.compares:
            others = answers_batch(self.template, [answer.get("mismatched", answer) for answer in answers])
            batch.update({f"{_OTHER}{name}": value for name, value in others.items()})
        return batch


def answer_lengths(item: Json) -> list[int]:
    """Tokens of each answer with its prompt."""
    return [len(answer["input_ids"]) for answer in item["answers"]]


class Kto(Compared):
    """The objective of a loss on single answers. kl: of the global batch whose micro batches run."""

    counts: tuple[str, ...] = ("answers",)

    def __init__(self, loss: KtoLoss, policy: PreTrainedModel, reference: PreTrainedModel | None) -> None:
        super().__init__(policy, reference)
        self.kto_loss = loss
        self.kl = torch.zeros(())

    def count(self, batch: Batch) -> list[int]:
        return [int(batch["answers"])]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        policy = self.log_probs(model, batch)
        reference = self.reference_log_probs(batch, policy)
        return self.share(self.kto_loss.sums(policy, reference, batch["desirable"], self.kl.to(policy.sums)))

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["loss"] / sums["answers"]

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.kto_loss.metrics(sums)


class KtoTrainer(ReferenceTrainer):
    objective: Kto

    def setup(self, run: Run) -> None:
        super().setup(run)
        if self.objective.kto_loss.compares:
            self.references = 2 * self.references + 1  # policy and reference answer mismatched prompts as well

    def inputs(self, batch: Batch) -> Batch:
        return super().inputs({name: value for name, value in batch.items() if not name.startswith(_OTHER)})

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Batch, bool]]) -> None:
        """Measure the distance of the global batch, without dropout. Collective."""
        if not self.objective.kto_loss.compares:
            return
        scores = torch.zeros(2, dtype=torch.float64, device=self.device)  # their sum and number
        training = self.model.training
        self.model.eval()
        for batch, counts in batches:
            others = {name.removeprefix(_OTHER): v for name, v in batch.items() if name.startswith(_OTHER)}
            inputs = super().inputs(others)
            with self.accelerator.autocast():
                policy = self.objective.log_probs(self.model, inputs)
                found = policy.sums - self.objective.reference_log_probs(inputs, policy).sums
            scores += counts * torch.stack([found.double().sum(), scores.new_tensor(len(found))])
        self.model.train(training)
        if get_world_size() > 1:
            torch.distributed.all_reduce(scores)
        self.objective.kl = self.objective.kto_loss.kl(scores[0], scores[1])


def kto_main(args: DpoArguments | Sequence[str]) -> Json:
    """Train on labelled answers; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(DpoArguments, args)
    with started(args, load_answers) as (model, template, data, start):
        reference = reference_model(args, model)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        loss = kto_loss(args)
        collate = AnswerCollator(template, loss.compares)
        return run_trainer(
            KtoTrainer(args, model, template, Kto(loss, model, reference), collate, answer_lengths), data, start
        )
