"""What a run tells: progress bar, log lines, logging.jsonl, TensorBoard, the plot at the end. Active on rank 0 only."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swiftlite.utils.logger import get_logger

logger = get_logger()

JSONL = "logging.jsonl"
PLOT = "loss.png"


class Metrics:
    """Collects numbers by step and writes them in every form that was asked for.

    Args:
        directory: of the run. first_step, last_step: steps already done, and in all.
        report_to: 'tensorboard' and others that are installed. active: False on ranks that only compute.
    """

    def __init__(
        self, directory: Path, tensorboard_dir: str | None, report_to: Sequence[str], first_step: int, last_step: int,
        active: bool = True,
    ) -> None:  # fmt: skip
        self.directory, self.last_step, self.active = directory, last_step, active
        self.started = time.perf_counter()
        self._first_step = first_step
        self._writer: Any = None
        self._bar: Any = None
        if not active:
            return
        from tqdm import tqdm

        self._keep_history(first_step)
        self._jsonl = (directory / JSONL).open("a", encoding="utf-8")
        if "tensorboard" in report_to and tensorboard_dir:
            self._writer = _tensorboard(tensorboard_dir, first_step)
        self._bar = tqdm(total=last_step, initial=first_step, desc="train", unit="step", dynamic_ncols=True)

    def _keep_history(self, first_step: int) -> None:
        """Lines of steps that a resumed run does again are taken out, so that the curve has each step once."""
        path = self.directory / JSONL
        if path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= first_step]
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def advance(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        """One step is done: move the bar."""
        if self.active:
            self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.2e}", grad_norm=f"{grad_norm:.3f}", refresh=False)
            self._bar.update(1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line: step, values, elapsed and remaining time in seconds."""
        if not self.active:
            return
        elapsed = time.perf_counter() - self.started
        done = max(step - self._first_step, 1)
        line: dict[str, Any] = {"step": step, "total_steps": self.last_step, **values}
        line["elapsed_s"] = round(elapsed, 3)
        line["remaining_s"] = round(elapsed / done * (self.last_step - step), 3)
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        shown = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        self._bar.clear()
        logger.info("step %d/%d: %s, eta %s", step, self.last_step, shown, format_seconds(line["remaining_s"]))
        self._bar.refresh()

    def close(self) -> None:
        """End the bar and flush the files; also after an error."""
        if not self.active:
            return
        self._bar.close()
        self._jsonl.close()
        if self._writer is not None:
            self._writer.close()

    def plot(self) -> Path | None:
        """Draw loss, learning rate and gradient norm over steps as a PNG. Returns: the file, None without matplotlib."""
        if not self.active:
            return None
        return plot_history(self.directory / JSONL, self.directory / PLOT)


def _tensorboard(directory: str, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard is not installed, so no event files are written: pip install tensorboard")
        return None
    return SummaryWriter(directory, purge_step=first_step + 1 if first_step else None)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line).get("step", 0))
    except ValueError:  # a line that a kill cut off
        return 1 << 60


def read_history(path: Path) -> list[dict[str, Any]]:
    """Lines of a logging.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def plot_history(source: Path, target: Path) -> Path | None:
    """Draw logging.jsonl. Returns: `target`, or None if matplotlib is missing or there is nothing to draw."""
    history = read_history(source)
    panels = [p for p in ("loss", "lr", "grad_norm") if any(p in line for line in history)]
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.warning("matplotlib is not installed, so no plot is drawn: pip install matplotlib")
        return None
    figure = Figure(figsize=(8, 3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        points = [(line["step"], line[name]) for line in history if name in line]
        axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        held_out = [(line["step"], line[f"eval_{name}"]) for line in history if f"eval_{name}" in line]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), label=f"eval_{name}", marker="o")
            axis.legend()
        axis.set_ylabel(name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axis.set_xlabel("step")
    figure.savefig(target, dpi=120)
    return target


def format_seconds(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
