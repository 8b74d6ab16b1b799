"""`swiftlite sft` and `swiftlite pt`: training on tokens with transformers; all parameters, some, or LoRA through peft.

The same arguments, samples, order, schedule and loss (a mean over the tokens of the global batch) as on Megatron.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_data
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.template.collate import sample_lengths
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.grouped import train_groups
from swiftlite.llm.train.objectives import objective_of
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.utils.types import Json


def sft_main(args: SftArguments | Sequence[str]) -> Json:
    """Train; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed (`["--model", "DIR", "--dataset", "FILE"]`).
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(SftArguments, args)
    if args.groups:
        return train_groups(args)
    with started(args, load_data) as (model, template, data, start):
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        trainer = HfTrainer(args, model, template, *objective_of(args, template, data), sample_lengths)
        return run(trainer, data, start)


def pt_main(args: PtArguments | Sequence[str]) -> Json:
    """Continued pre-training: plain `text` rows, each ended by the end token, packed; all tokens are trained on."""
    return sft_main(as_arguments(PtArguments, args))
