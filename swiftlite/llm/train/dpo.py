"""`swiftlite dpo` (`rlhf --rlhf_type dpo`): direct preference optimisation with transformers, all parameters or LoRA.

The reference is the model as training began, --ref_model, or with LoRA the model with its adapters off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.preference import PairCollator, Preference, pair_lengths
from swiftlite.llm.train.reference import reference_model
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.checkpoints import Start
from swiftlite.train.reference import pair_loss
from swiftlite.utils.dist import all_gather
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()


class DpoTrainer(HfTrainer):
    """The engine with a reference model next to it, or with what that said before training."""

    objective: Preference

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.references = int(self.args.has_reference and not self.args.precompute_ref_log_probs)

    def load(self, start: Start | None) -> int:
        self.objective.parts = self.parts
        done = super().load(start)
        if self.objective.reference is not None:
            self.place(self.objective.reference)
            if self.parts is not None:
                self.parts.install(self.objective.reference)
        if self.args.precompute_ref_log_probs:
            for dataset in (self.run.train_set, self.run.val_set):
                if isinstance(dataset, PairDataset):
                    self.precompute(dataset)
            self.objective.reference = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done

    @torch.no_grad()
    def precompute(self, dataset: PairDataset) -> None:
        """Keep the reference's log-probabilities of all pairs; ranks share the work. Collective."""
        plan = self.run.plan
        mine, size = range(plan.dp_rank, dataset.pairs, plan.dp_size), plan.micro_batch_size
        found: list[tuple[int, float, float]] = []
        for start in range(0, -(-dataset.pairs // plan.dp_size), size):
            indices = mine[start : start + size]  # perhaps none: ranks run a sharded model together
            batch = self.inputs(self.collate([{"pairs": [dataset.pair(i) for i in indices or [0]]}]))
            with self.accelerator.autocast():
                sums = self.objective.reference_log_probs(batch).sums
            found += zip(indices, *(part[: len(indices)].tolist() for part in sums.chunk(2)), strict=True)
        everybody = sorted({entry for part in all_gather(found) for entry in part})
        dataset.reference = [(chosen, rejected) for _, chosen, rejected in everybody]
        logger.info("the reference answered %d pairs", dataset.pairs)


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
        return run(DpoTrainer(args, model, template, objective, PairCollator(template), pair_lengths), data, start)
