"""`swiftlite megatron sft --task_type seq_cls`: classes or numbers by a score head, on megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.llm.dataset.classes import Labels, labels_of
from swiftlite.megatron.trainers.pooled import PooledBatch, PooledLoader, PooledTrainer
from swiftlite.train.classification import ClassificationLoss
from swiftlite.utils.types import Json


class LabelLoader(PooledLoader):
    """Makes the micro batches of a step from samples with labels."""

    labels: Labels

    @classmethod
    def of(cls, dataset: Any, args: MegatronSftArguments, *rest: Any, **others: Any) -> Self:
        made = super().of(dataset, args, *rest, **others)
        made.labels = Labels.of(args)  # type: ignore[assignment]
        return made

    def targets(self, rows: Sequence[Json]) -> Tensor:
        return self.labels.tensor([label for row in rows for label in labels_of(row)])


class ClassificationTrainer(PooledTrainer):
    """The loss of samples' scores; see ClassificationLoss."""

    loader = LabelLoader
    counted = "labels"

    def __init__(self, args: MegatronSftArguments, *rest: Any) -> None:
        super().__init__(args, *rest)
        labels = Labels.of(args)
        assert labels is not None
        self.classification = ClassificationLoss(labels.problem_type, labels.num_labels)
        none = torch.zeros(0, labels.num_labels), labels.tensor([])
        self.names = {by_class: tuple(self.classification.sums(*none, by_class)) for by_class in (False, True)}

    @property
    def evaluates(self) -> bool:
        return bool(self.models) and not self.models[0].training

    @property
    def sums(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.names[self.evaluates]

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.classification.metrics(sums)

    def judge(self, batch: PooledBatch, outputs: Tensor) -> dict[str, Tensor]:
        return self.classification.sums(outputs, batch.targets, self.evaluates)
