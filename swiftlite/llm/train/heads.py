"""Objectives of models with a head on the transformers engine: classes and numbers, rewards of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.llm.dataset.classes import Labels, labels_of
from swiftlite.llm.dataset.pairs import sequences_of
from swiftlite.llm.model.heads import last_token, logits_at
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.train.classification import ClassificationLoss
from swiftlite.train.objective import Batch
from swiftlite.train.reward_loss import RewardLoss
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

_NOT_INPUTS = ("labels", "loss_scale", "pooled", "targets", "margins")


class PooledCollator:
    """Encoded conversations, perhaps several to a row -> a batch with `pooled`, see `logits_at`, instead of labels."""

    def __init__(self, template: Template) -> None:
        self.template = template

    def last(self, ids: Sequence[int]) -> int:
        """Which token of a sample counts."""
        return last_token(ids, self.template.pad_token_id)

    def rows(self, rows: Sequence[Json]) -> Batch:
        template = self.template
        batch: Batch = template.data_collator(rows)
        width, before = batch["input_ids"].shape[1], 0
        found: list[int] = []
        for number, row in enumerate(rows):
            ids, lengths = row["input_ids"], sample_lengths(row)
            if not template.padding_free:
                before = number * width + (width - len(ids) if template.padding_side == "left" else 0)
            for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
                found.append(before + start + self.last(ids[start : start + length]))
            before += len(ids)
        del batch["labels"]
        batch.pop("loss_scale", None)
        batch["pooled"] = torch.tensor(found)
        return batch


class LabelledCollator(PooledCollator):
    """... and with `targets`, the labels as a tensor."""

    def __init__(self, template: Template, labels: Labels) -> None:
        super().__init__(template)
        self.labels = labels

    def __call__(self, rows: Sequence[Json]) -> Batch:
        batch = self.rows(rows)
        batch["targets"] = self.labels.tensor([label for row in rows for label in labels_of(row)])
        return batch


class RewardCollator(PooledCollator):
    """Items of a PairDataset -> conversations of all chosen answers, then of all rejected ones; `margins` [P] if given."""

    def __call__(self, items: Sequence[Json]) -> Batch:
        batch = self.rows(sequences_of(items))
        margins = [pair.get("margin") for item in items for pair in item["pairs"]]
        if any(margin is not None for margin in margins):
            batch["margins"] = torch.tensor([margin or 0.0 for margin in margins])
        return batch


def _logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name not in (*_NOT_INPUTS, "counts")}
    return logits_at(model, inputs, batch["pooled"])


class Classification:
    """The objective of a ClassificationLoss."""

    counts: tuple[str, ...] = ("labels",)

    def __init__(self, labels: Labels) -> None:
        self.classification = ClassificationLoss(labels.problem_type, labels.num_labels)

    def count(self, batch: Batch) -> list[int]:
        return [len(batch["pooled"])]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.classification.sums(_logits(model, batch), batch["targets"], by_class=not model.training)

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.classification.total(sums)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.classification.metrics(sums)


class Rewards:
    """The objective of a RewardLoss."""

    counts: tuple[str, ...] = ("pairs",)

    def __init__(self, loss: RewardLoss) -> None:
        self.reward = loss

    def count(self, batch: Batch) -> list[int]:
        return [len(batch["pooled"]) // 2]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        chosen, rejected = _logits(model, batch).squeeze(-1).chunk(2)
        return self.reward.sums(chosen, rejected, batch.get("margins"))

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.reward.total(sums)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.reward.metrics(sums)
