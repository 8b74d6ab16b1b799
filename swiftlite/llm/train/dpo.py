"""`swiftlite dpo` (`rlhf --rlhf_type dpo`): direct preference optimisation with transformers, all parameters or LoRA.

The reference is the model as training began, --ref_model, or with LoRA the model with its adapters off.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.preference import PairCollator, Preference, pair_lengths
from swiftlite.llm.train.reference import ReferenceTrainer, reference_model
from swiftlite.llm.train.run import run
from swiftlite.train.reference import pair_loss
from swiftlite.utils.types import Json


def dpo_main(args: DpoArguments | Sequence[str]) -> Json:
    """Train on preference pairs; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(DpoArguments, args)
    with started(args, load_pairs) as (model, template, data, start):
        reference = reference_model(args, model)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        objective = Preference(pair_loss(args), model, reference, args.has_reference)
        return run(
            ReferenceTrainer(args, model, template, objective, PairCollator(template), pair_lengths), data, start
        )
