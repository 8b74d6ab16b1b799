"""What a run tells: progress bar, log lines, logging.jsonl, TensorBoard, wandb, swanlab, the plot at the end.

Active on rank 0 only. What the numbers mean is in meters.py.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from swiftlite.train.plot import JSONL, plot_runs, read_run, title_of
from swiftlite.utils.errors import SwiftliteError, UsageError
from swiftlite.utils.io import write_text_atomic
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.utils.secrets import without_secrets
from swiftlite.utils.text import format_seconds
from swiftlite.utils.types import Json

logger = get_logger()

PLOT = "loss.png"

# What is too long for the progress of a log line on the screen; logging.jsonl has everything.
_QUIET = frozenset({"padded_tokens_per_second", "samples_per_second", "logps/chosen", "logps/rejected"})


class Metrics:
    """Collects numbers by step and writes them in every form that was asked for.

    Args:
        directory: of the run. first_step, last_step: steps already done, and in all.
        report_to: 'tensorboard', 'wandb', 'swanlab' or 'none'. active: False on ranks that only compute.
        settings: what trackers record of the run: its arguments, with `wandb_project` and `wandb_exp_name`.
    Raises: UsageError for a tracker that is asked for and not installed.
    """

    def __init__(
        self, directory: Path, tensorboard_dir: str | None, report_to: Sequence[str], first_step: int, last_step: int,
        active: bool = True, settings: Mapping[str, object] | None = None,
    ) -> None:  # fmt: skip
        self.directory, self.last_step = directory, last_step
        self.active = active
        self.started = time.perf_counter()
        self._first_step = first_step
        self._trackers: list[_Tracker] = []
        self._bar: Any = None
        if not active:
            return
        for name in report_to:
            if name != "none":
                tracker = _TRACKERS[name](directory, tensorboard_dir, first_step, settings or {})
                if tracker is not None:
                    self._trackers.append(tracker)
        self._keep_history(first_step)
        self._jsonl = (directory / JSONL).open("a", encoding="utf-8")
        self._bar = progress_bar(total=last_step, initial=first_step, desc="train", unit="step")

    def _keep_history(self, first_step: int) -> None:
        """Lines of steps that a resumed run does again are taken out, so that the curve has each step once.

        So are damaged lines: a kill or a disk cut them off.
        """
        path = self.directory / JSONL
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            steps = [_step_of(line) for line in lines]
            if None in steps:
                logger.warning("%s: dropping %d damaged lines", path, steps.count(None))
            kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= first_step]
            write_text_atomic(path, "".join(f"{line}\n" for line in kept))

    def advance(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """One step is done: move the bar."""
        if self.active:
            self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", grad_norm=f"{grad_norm:.3f}", refresh=False)
            self._bar.update(1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line: step, values, elapsed and remaining time in seconds."""
        if not self.active:
            return
        elapsed = time.perf_counter() - self.started
        done = max(step - self._first_step, 1)
        line: Json = {"step": step, "total_steps": self.last_step, **values}
        line["elapsed_s"] = round(elapsed, 3)
        line["remaining_s"] = round(elapsed / done * (self.last_step - step), 3)
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        for tracker in self._trackers:
            tracker.log(values, step)
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items() if name not in _QUIET)
        with self._bar.external_write_mode(sys.stderr):  # takes a bar in the terminal away, and draws it again
            logger.info("step %d/%d: %s, eta %s", step, self.last_step, shown, format_seconds(line["remaining_s"]))

    def close(self) -> None:
        """End the bar and flush the files; also after an error."""
        if not self.active:
            return
        self._bar.close()
        self._jsonl.close()
        for tracker in self._trackers:
            tracker.close()

    def plot(self) -> Path | None:
        """Draw the run's curves as a PNG. Returns: the file, None without matplotlib or without a line to draw."""
        if not self.active:
            return None
        return plot_runs({"": read_run(self.directory)}, self.directory / PLOT, title_of(self.directory))


class _Tracker:
    """Where metrics go besides the run's own files."""

    def __init__(self, log: Callable[[Mapping[str, float], int], object], close: Callable[[], object]) -> None:
        self.log, self.close = log, close


def _tensorboard(
    directory: Path, target: str | None, first_step: int, settings: Mapping[str, object]
) -> _Tracker | None:
    if not target:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is the default, so nobody may have asked for it
        logger.warning("TensorBoard is not installed, so no event files are written: pip install tensorboard")
        return None
    writer = SummaryWriter(target, purge_step=first_step + 1 if first_step else None)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return _Tracker(log, writer.close)


def _import_tracker(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f"--report_to {name}: is not installed; pip install {name}, or leave it out") from None


def _named(directory: Path, settings: Mapping[str, object]) -> tuple[str, str, Json]:
    """(project, run, configuration) without access tokens."""
    project, name = settings.get("wandb_project") or "swiftlite", settings.get("wandb_exp_name") or directory.name
    return str(project), str(name), without_secrets(settings)


def _wandb(directory: Path, target: str | None, first_step: int, settings: Mapping[str, object]) -> _Tracker:
    wandb = _import_tracker("wandb")
    project, name, config = _named(directory, settings)
    run = wandb.init(project=project, name=name, config=config, dir=str(directory))
    return _Tracker(lambda values, step: run.log(dict(values), step=step), run.finish)


def _swanlab(directory: Path, target: str | None, first_step: int, settings: Mapping[str, object]) -> _Tracker:
    swanlab = _import_tracker("swanlab")
    project, name, config = _named(directory, settings)
    swanlab.init(project=project, experiment_name=name, config=config, logdir=str(directory / "swanlab"))
    return _Tracker(lambda values, step: swanlab.log(dict(values), step=step), swanlab.finish)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}


def _step_of(line: str) -> int | None:
    """None for a damaged line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises: SwiftliteError if one of a step's values is not finite."""
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise SwiftliteError(
            f"step {step}: {shown}; training has diverged. Lower --lr or raise --lr_warmup_iters, and start again from "
            "the last checkpoint"
        )
