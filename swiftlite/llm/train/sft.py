"""`swiftlite sft` and `swiftlite pt`: training on tokens with transformers; all parameters, some, or LoRA through peft.

The same arguments, samples, order, schedule and loss (a mean over the tokens of the global batch) as on Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch.nn.functional import pad

from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_data
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.llm.train.batches import Collate
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.channels import Channels
from swiftlite.train.objective import Batch, LanguageModeling
from swiftlite.train.plugins import token_loss_of
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template


def sft_main(args: SftArguments | Sequence[str]) -> Json:
    """Train; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed (`["--model", "DIR", "--dataset", "FILE"]`).
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(SftArguments, args)
    with started(args, load_data) as (model, template, data, start):
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        channels = Channels.of(data) if args.enable_channel_loss else None
        objective = LanguageModeling(token_loss_of(args), channels)
        collate = by_channel(template, channels) if channels else template.data_collator
        trainer = HfTrainer(args, model, template, objective, collate, sample_lengths)
        return run(trainer, data, start)


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


def pt_main(args: PtArguments | Sequence[str]) -> Json:
    """Continued pre-training: plain `text` rows, each ended by the end token, packed; all tokens are trained on."""
    return sft_main(as_arguments(PtArguments, args))
