"""What `swiftlite sft` minimises, by --task_type, and how its batches are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.dataset.classes import Labels
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.llm.train.batches import Collate
from swiftlite.llm.train.heads import Classification, LabelledCollator
from swiftlite.train.channels import Channels
from swiftlite.train.objective import Batch, LanguageModeling, Objective
from swiftlite.train.order import Data
from swiftlite.train.plugins import token_loss_of
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template


def objective_of(args: SftArguments, template: Template, data: Data) -> tuple[Objective, Collate]:
    """What --task_type minimises, and how its batches are made."""
    labels = Labels.of(args)
    if labels is not None:
        return Classification(labels), LabelledCollator(template, labels)
    channels = Channels.of(data) if args.enable_channel_loss else None
    collate = by_channel(template, channels) if channels else template.data_collator
    return LanguageModeling(token_loss_of(args), channels), collate


def by_channel(template: Template, channels: Channels) -> Collate:
    """The template's batches with `channels` [B, S]: which one each token belongs to."""

    def collate(rows: Sequence[Json]) -> Batch:
        batch: Batch = template.data_collator(rows)
        numbers, shape = channels.numbers(rows), batch["labels"].shape
        if template.padding_free:
            sizes = torch.tensor([n for row in rows for n in sample_lengths(row)])
            numbers = numbers.repeat_interleave(sizes)
            batch["channels"] = pad(numbers, (0, shape[1] - len(numbers))).unsqueeze(0)
        else:
            batch["channels"] = numbers.unsqueeze(1).expand(shape).contiguous()
        return batch

    return collate
