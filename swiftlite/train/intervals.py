"""When a run logs, evaluates and saves; which checkpoint is the best. Shared by both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from swiftlite.arguments.train import TrainArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()

BEST_FILE = "best.json"


class Intervals:
    """Decides per step, counted from 1. Args: steps_per_epoch: None where nobody knows (streams)."""

    def __init__(self, args: TrainArguments, total_steps: int, steps_per_epoch: float | None, evaluates: bool) -> None:
        self.args, self.total = args, total_steps
        self.steps_per_epoch, self.has_eval = steps_per_epoch, evaluates
        by_save = args.save_strategy == "epoch" and "eval_steps" not in args.given
        self.eval_strategy = args.eval_strategy or ("epoch" if by_save else "steps")
        for flag in ("save", "eval"):
            if getattr(args, f"{flag}_strategy") == "epoch" and steps_per_epoch is None:
                raise UsageError(f"--{flag}_strategy epoch: a stream has no known epochs; use --{flag}_steps")
        if args.early_stop_interval and (self.eval_strategy == "no" or not evaluates):
            raise UsageError("--early_stop_interval: needs evaluations; give --val_dataset or --split_dataset_ratio")

    def logs(self, step: int) -> bool:
        return step == 1 or step % self.args.logging_steps == 0 or step == self.total

    def evaluates(self, step: int) -> bool:
        if not self.has_eval or self.eval_strategy == "no":
            return False
        if self.eval_strategy == "epoch":
            return self.ends_epoch(step) or step == self.total
        return step % (self.args.eval_steps or self.args.save_steps) == 0 or step == self.total

    def saves(self, step: int) -> bool:
        if step == self.total:
            return True
        if self.args.save_strategy == "epoch":
            return self.ends_epoch(step)
        return self.args.save_strategy == "steps" and step % self.args.save_steps == 0

    def ends_epoch(self, step: int) -> bool:
        """True for the step that trains on the last sample of a pass over the data."""
        assert self.steps_per_epoch is not None
        return int(step / self.steps_per_epoch + 1e-9) > int((step - 1) / self.steps_per_epoch + 1e-9)


def names_of(metrics: Callable[[dict[str, float]], Mapping[str, float]]) -> list[str]:
    """What a trainer's `metrics` makes of any sums."""
    return list(metrics(defaultdict(lambda: 1.0)))


class Best:
    """Remembers the checkpoint with the best evaluation in OUTPUT_DIR/best.json: {"step", "checkpoint", metric: value}.

    Args:
        metric: name in the evaluation's values, with or without `eval_`. greater: whether more is better; None: unless
            it is a loss.
        measured: names without `eval_` that an evaluation has; None: nothing is evaluated.
    Raises: UsageError if the metric is not among them; CheckpointError if best.json is damaged.
    """

    def __init__(
        self, root: Path, metric: str, greater: bool | None = None, measured: Collection[str] | None = None
    ) -> None:
        self.root = root
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        names = [f"eval_{name}" for name in measured or ()]
        if names and self.metric not in names:
            raise UsageError(f"--metric_for_best_model {metric}: is not measured; there are {', '.join(names)}")
        self.worse_since = 0  # checkpoints of this process that were evaluated after it
        self.greater = "loss" not in metric if greater is None else greater
        path = root / BEST_FILE
        self.record: Json = read_json(path, optional=True)
        if not (root / str(self.record.get("checkpoint"))).is_dir():
            self.record = {}

    @property
    def checkpoint(self) -> str | None:
        """Name of the directory; rotation leaves it alone."""
        return self.record.get("checkpoint")

    def describe(self) -> str:
        """`eval_loss 1.90322`; without the value where an earlier run chose by another metric."""
        value = self.record.get(self.metric)
        return self.metric if value is None else f"{self.metric} {value:.6g}"

    def is_over(self, early_stop_interval: int | None) -> bool:
        """Were so many checkpoints in a row worse than the best? A run that is resumed counts anew."""
        return early_stop_interval is not None and self.worse_since >= early_stop_interval

    def saved(self, step: int, checkpoint: str, evaluation: Mapping[str, float]) -> bool:
        """A checkpoint stands; `evaluation` holds the values of this very step, {} if there was none. Rank 0 only.

        Returns: whether it is the best so far.
        """
        if self.metric not in evaluation:  # none; or a channel's or a kind of answers', of which it had no rows
            return False
        value, best = evaluation[self.metric], self.record.get(self.metric)
        if best is not None and (value <= best if self.greater else value >= best):
            self.worse_since += 1
            return False
        self.worse_since = 0
        self.record = {"step": step, "checkpoint": checkpoint, self.metric: value}
        write_json(self.root / BEST_FILE, self.record)
        return True
