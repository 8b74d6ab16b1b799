"""Micro batches with what a teacher said of their tokens before training. Shapes: B rows, S tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from swiftlite.llm.dataset.teacher import TeacherLogits, weights_of_labels
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.train.batches import to_device
from swiftlite.train.distill_loss import Top


@dataclass(kw_only=True)
class TaughtBatch(MicroBatch):
    """top: of the labels with a weight, sample by sample. told: int64 [B, S], which of these a position's label is."""

    told: Tensor
    top: Top

    def to(self, device: torch.device) -> Self:
        return replace(super().to(device), top=self.top.to(partial(to_device, device=device)))


class TaughtLoader(BatchLoader):
    """From data whose `teacher` says what is known of one."""

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> MicroBatch:
        rows = self.rows(samples)
        teacher: TeacherLogits = getattr(self.dataset, "teacher")  # noqa: B009
        weights = [weight for row in rows for weight in weights_of_labels(row)]
        told = ((batch.loss_mask != 0).flatten().cumsum(0) - 1).view_as(batch.labels)
        return TaughtBatch(**vars(batch), told=told, top=teacher.of(rows)[torch.tensor(weights, dtype=torch.bool)])
