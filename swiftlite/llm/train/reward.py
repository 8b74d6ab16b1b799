"""`swiftlite rlhf --rlhf_type rm`: reward models with transformers: a head says a number for each answer of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.heads import RewardCollator, Rewards
from swiftlite.llm.train.preference import pair_lengths
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.reward_loss import RewardLoss
from swiftlite.utils.types import Json


def reward_main(args: DpoArguments | Sequence[str]) -> Json:
    """Train on the pairs of preference training, without a reference. Args, returns, raises: as dpo_main."""
    args = as_arguments(DpoArguments, args)
    with started(args, load_pairs) as (model, template, data, start):
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        objective = Rewards(RewardLoss.of(args))
        return run(HfTrainer(args, model, template, objective, RewardCollator(template), pair_lengths), data, start)
