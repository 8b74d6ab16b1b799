"""Answers under a policy and a reference as batches and objectives of the transformers engine; the loss on pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from swiftlite.llm.dataset.pairs import SIDES, sequences_of
from swiftlite.train.dpo_loss import LogProbs, PairLoss, answer_log_probs
from swiftlite.train.objective import Batch, Objective
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template
    from swiftlite.llm.train.ulysses import SequenceParts

# What a batch holds besides the model's inputs.
_NOT_INPUTS = ("labels", "sequence_ids", "reference", "answers", "desirable")


def answers_batch(template: Template, rows: Sequence[Json]) -> Batch:
    """Answers with their prompts -> one batch: rows, or joined to one sequence.

    Returns: input_ids, labels, position_ids, attention_mask [B, S] (joined: [1, S], without a mask); sequence_ids, which
    answer a position belongs to, int64 of the same shape; answers, B; reference [B], where it was computed before.
    """
    batch: Batch = template.data_collator(rows)
    if template.padding_free:
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        ids = torch.repeat_interleave(torch.arange(len(rows)), sizes)
        batch["sequence_ids"] = pad(ids, (0, batch["labels"].shape[1] - len(ids))).unsqueeze(0)
    else:
        batch["sequence_ids"] = torch.arange(len(rows)).unsqueeze(1).expand_as(batch["labels"]).contiguous()
    batch["answers"] = torch.tensor(len(rows))
    if all("reference" in row for row in rows):
        batch["reference"] = torch.tensor([row["reference"] for row in rows], dtype=torch.float32)
    return batch


class PairCollator:
    """Items of a PairDataset -> one batch of `answers_batch`: all chosen answers, then all rejected ones."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def __call__(self, items: Sequence[Json]) -> Batch:
        return answers_batch(self.template, sequences_of(items))


def pair_lengths(item: Json) -> list[int]:
    """Tokens of each answer with its prompt."""
    return [len(pair[side]["input_ids"]) for pair in item["pairs"] for side in SIDES]


def log_probs(model: torch.nn.Module, batch: Batch) -> LogProbs:
    """Of the answers in a batch under a model."""
    logits = model(**{name: value for name, value in batch.items() if name not in _NOT_INPUTS}).logits
    return answer_log_probs(logits, batch["labels"], batch["sequence_ids"], int(batch["answers"]))


class Compared(Objective):
    """What objectives share that compare a policy with a reference.

    reference: a model; None: the policy with its adapters off, if the loss has one. parts: of ranks that share sequences.
    """

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel | None, has_reference: bool = True) -> None:
        self.policy, self.reference = policy, reference
        self.has_reference = has_reference
        self.parts: SequenceParts | None = None

    def share(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of ranks that share sequences, and all have their sums."""
        return {name: value / self.parts.size for name, value in sums.items()} if self.parts else sums

    def log_probs(self, model: torch.nn.Module, batch: Batch) -> LogProbs:
        """Of whole answers, whose parts may be on several ranks."""
        found = log_probs(model, batch)
        return LogProbs(self.parts.add_up(found.sums), self.parts.add_up(found.tokens)) if self.parts else found

    @torch.no_grad()
    def reference_log_probs(self, batch: Batch, policy: LogProbs | None = None) -> LogProbs:
        if policy is not None and "reference" in batch:
            return LogProbs(batch["reference"], policy.tokens)
        if self.reference is not None:
            return self.log_probs(self.reference, batch)
        with _frozen(cast("PeftModel", self.policy)):
            return self.log_probs(self.policy, batch)


class Preference(Compared):
    """The objective of a pair loss."""

    counts: tuple[str, ...] = ("pairs", "chosen_tokens")

    def __init__(
        self, loss: PairLoss, policy: PreTrainedModel, reference: PreTrainedModel | None, has_reference: bool = True
    ) -> None:
        super().__init__(policy, reference, has_reference)
        self.pair_loss = loss

    def count(self, batch: Batch) -> list[int]:
        pairs = int(batch["answers"]) // 2
        answered = batch["labels"][:, 1:] != -100
        return [pairs, int((answered & (batch["sequence_ids"][:, 1:] < pairs)).sum())]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        policy = self.log_probs(model, batch)
        return self.share(
            self.pair_loss.sums(policy, self.reference_log_probs(batch, policy) if self.has_reference else None)
        )

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.pair_loss.total(sums["loss"], sums["pairs"], sums["nll"], sums["chosen_tokens"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.pair_loss.metrics(sums)


@contextmanager
def _frozen(model: PeftModel) -> Iterator[None]:
    """A LoRA model without its adapters and without dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)
