"""One run with transformers, whatever it trains. What comes before the model is prepared: begin.py."""

from __future__ import annotations

from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.checkpoints import Start
from swiftlite.train.loop import Run, train
from swiftlite.train.order import Data
from swiftlite.utils.dist import get_rank, get_world_size
from swiftlite.utils.types import Json


def run(trainer: HfTrainer, data: Data, start: Start | None) -> Json:
    """Train on `data`, training and validation set. Returns: as swiftlite.train.loop.train. Collective."""
    rank, size = (n // trainer.args.sequence_parallel_size for n in (get_rank(), get_world_size()))
    return train(Run(trainer.args, *data, rank, size, trainer.metrics), trainer, start)
