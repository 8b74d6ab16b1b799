"""Curves of runs as a PNG: one run's at its end, or several in one picture with `swiftlite plot RUN [RUN ...]`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from swiftlite.arguments.plot import PlotArguments
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()

JSONL = "logging.jsonl"
# Panels, top to bottom, each with its unit, and the curves of each; one that no run has is left out.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss (nats)", ("loss", "eval_loss")),
    ("rewards (nats)", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("reward accuracy (share of pairs)", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("learning rate (per step)", ("lr",)),
    ("gradient norm (nats)", ("grad_norm",)),
    ("throughput (tokens/s)", ("tokens_per_second",)),
    ("MFU (share of peak)", ("mfu",)),
)
_STYLES = ("-", "--", ":")  # of the curves of one panel, where colours tell runs apart


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, object]]], target: Path, title: str | None = None
) -> Path | None:
    """Draw lines of logging.jsonl, by the runs' names; title: default these names.

    Returns: `target`, None without matplotlib or without lines.
    """
    present = {name for history in runs.values() for line in history for name in line}
    panels = [(label, found) for label, names in PANELS if (found := [n for n in names if n in present])]
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.warning("matplotlib is not installed, so no plot is drawn: pip install matplotlib")
        return None
    figure = Figure(figsize=(8, 2.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (label, names) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for number, (run, history) in enumerate(runs.items()):
            for style, name in zip(_STYLES, names, strict=False):
                points = [(line["step"], line[name]) for line in history if line.get(name) is not None]
                if points:
                    # Earlier runs are wider, so that one that lies under another is seen.
                    width = 1.5 + 3 * (len(runs) - 1 - number) / len(runs)
                    look = {"color": f"C{number}", "linestyle": style, "linewidth": width} if len(runs) > 1 else {}
                    curve = " ".join(word for word in (run, name if len(names) > 1 else "") if word)
                    axis.plot(*zip(*points, strict=True), label=curve, marker="." if len(points) < 50 else None, **look)
        if len(names) > 1 or len(runs) > 1:
            axis.legend(fontsize="small")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axis.set_xlabel("step (updates of the weights)")
    figure.suptitle(title or ", ".join(runs))
    figure.savefig(target, dpi=120)
    return target


def read_run(path: str | Path) -> list[Json]:
    """Lines of a run's logging.jsonl; `path` is the file or its directory. A last line that a kill cut off is left out.

    Raises: CheckpointError if there is none, or it cannot be read.
    """
    file = Path(path) / JSONL if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise CheckpointError(f"{path}: holds no {JSONL}; name the --output_dir of a training run")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise CheckpointError(f"{file}: line {number} is not JSON; fix or remove it") from None
    return history


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as make the names differ."""
    parts = [[part for part in Path(path).parts if part != JSONL] or [path] for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def plot_main(args: PlotArguments) -> Json:
    """Compare runs: a picture, and a table of how they ended in the log. Returns: {"plot": file, "runs": last values}."""
    from swiftlite.checkpoint.resolve import as_arguments

    args = as_arguments(PlotArguments, args)
    runs = dict(zip(short_names(args.runs), map(read_run, args.runs), strict=True))
    last: dict[str, Json] = {}
    for name, history in runs.items():
        merged: Json = {}
        for line in history:
            merged.update(line)
        last[name] = merged
        shown = (
            "step",
            "loss",
            "eval_loss",
            "rewards/accuracies",
            "tokens_per_second",
            "mfu",
            "memory_gib",
            "elapsed_s",
        )
        logger.info("%s: %s", name, ", ".join(f"{key} {merged[key]:.6g}" for key in shown if key in merged))
    target = Path(args.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    plot = plot_runs(runs, target)
    if plot is None:
        raise UsageError("nothing to plot: the runs have no log lines yet, or matplotlib is missing")
    logger.info("wrote %s", plot)
    return {"plot": str(plot), "runs": last}
