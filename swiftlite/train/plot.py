"""Curves of runs: one run's PNG at its end; `swiftlite plot RUN [RUN ...]`, several in a PNG or a page to zoom."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path

from swiftlite.arguments.plot import PlotArguments
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.io import write_text_atomic
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import nearest, short, some
from swiftlite.utils.types import Json

logger = get_logger()

JSONL = "logging.jsonl"
Runs = Mapping[str, Sequence[Mapping[str, object]]]


@dataclass(frozen=True)
class Panel:
    """Curves with one axis. title: what and its unit; names: of the curves in logging.jsonl."""

    title: str
    names: tuple[str, ...]


# Top to bottom; a panel that no run has is left out. The first one is larger.
PANELS = (
    Panel("loss (nats)", ("loss", "eval_loss")),
    Panel("rewards (nats)", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    Panel("reward accuracy (share of pairs)", ("rewards/accuracies", "eval_rewards/accuracies")),
    Panel("learning rate (per step)", ("lr",)),
    Panel("gradient norm (nats)", ("grad_norm",)),
    Panel("throughput (tokens/s)", ("tokens_per_second",)),
    Panel("MFU (share of peak)", ("mfu",)),
)
_STYLES, _DASHES = (
    ("-", "--", ":"),
    ("solid", "dash", "dot"),
)  # of the curves of one panel, where colours tell runs apart
_LONG = 100  # points from which a curve is drawn pale, with its running mean over it
_LABEL = 60  # characters of a model's, data set's or run's name


@dataclass(frozen=True)
class Curve:
    """One line of a panel: its run and name in the log, steps and values; smooth: running means, None for short ones."""

    run: str
    name: str
    steps: list[int]
    values: list[float]
    smooth: list[float] | None


def panels_of(runs: Runs, wanted: Sequence[str] = ()) -> list[Panel]:
    """What is drawn. wanted: names of curves or first words of panels; other names in the logs get panels of their own.

    Raises: UsageError for a name that no run has.
    """
    present = {name: None for history in runs.values() for line in history for name in line if _is_curve(line, name)}
    panels = [Panel(p.title, found) for p in PANELS if (found := tuple(n for n in p.names if n in present))]
    if not wanted:
        return panels
    chosen: list[Panel] = []
    for word in wanted:
        fitting = [p for p in panels if word in (p.title.partition(" (")[0].replace(" ", "_"), *p.names)]
        if not fitting and word not in present:
            hint = nearest(word, present)
            raise UsageError(f"--panels {word}: no run has it{hint or f'; there are {some(sorted(present), 40)}'}")
        chosen += [p for p in fitting or [Panel(word, (word,))] if p not in chosen]
    return chosen


def _is_curve(line: Mapping[str, object], name: str) -> bool:
    return name != "step" and isinstance(line[name], int | float)


def curves_of(runs: Runs, panel: Panel) -> list[Curve]:
    curves = []
    for run, history in runs.items():
        for name in panel.names:
            points = [
                (int(str(line["step"])), float(str(line[name]))) for line in history if line.get(name) is not None
            ]
            if points:
                steps, values = [step for step, _ in points], [value for _, value in points]
                smooth = running_mean(values) if len(values) >= _LONG and not name.startswith("eval_") else None
                curves.append(Curve(run, name, steps, values, smooth if name != "lr" else None))
    return curves


def running_mean(values: Sequence[float]) -> list[float]:
    """Means over a fortieth of the curve around each point, so that they do not lag; over less at the steep begin."""
    sums, means = [0.0, *accumulate(values)], []
    for i in range(len(values)):
        half = min(max(len(values) // 80, 1), i)
        first, end = i - half, min(i + half + 1, len(values))
        means.append((sums[end] - sums[first]) / (end - first))
    return means


def plot_runs(
    runs: Runs, target: Path, title: str | None = None, panels: Sequence[Panel] | None = None, log_scale: bool = False
) -> Path | None:
    """Draw lines of logging.jsonl, by the runs' names; title: default these names; log_scale: of the first panel.

    Returns: `target`, None without matplotlib or without lines.
    """
    panels = panels_of(runs) if panels is None else panels
    if not panels:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        logger.warning("matplotlib is not installed, so no plot is drawn: pip install matplotlib")
        return None
    heights = [2] + [1] * (len(panels) - 1)
    figure = Figure(figsize=(9, 1.0 + 1.9 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    entries: dict[str, Line2D] = {}
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        for curve in curves_of(runs, panel):
            look = _look(runs, panels, panel, curve)
            marker = "." if len(curve.steps) < 50 else None
            if curve.smooth is not None:
                axis.plot(curve.steps, curve.values, **{**look, "linewidth": 0.8}, alpha=0.3)
                axis.plot(curve.steps, curve.smooth, **look)
            else:
                axis.plot(curve.steps, curve.values, marker=marker, **look)
            color, dashes = str(look["color"]), str(look["linestyle"])
            if len(runs) > 1:
                entries.setdefault(short(curve.run, _LABEL), Line2D([], [], color=color))
                color = "grey"
            if len(panel.names) > 1:
                entries.setdefault(curve.name, Line2D([], [], color=color, linestyle=dashes))  # type: ignore[arg-type]
        axis.set_title(panel.title, loc="left", fontsize="medium")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if log_scale and number == 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
    axes[-1].set_xlabel("step (updates of the weights)")
    if any(curve.smooth for panel in panels for curve in curves_of(runs, panel)):
        entries["pale: each log line; strong: running mean"] = Line2D([], [], color="none")
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(title or ", ".join(short(run, _LABEL) for run in runs))
    figure.savefig(target, dpi=120)
    return target


def _look(runs: Runs, panels: Sequence[Panel], panel: Panel, curve: Curve) -> dict[str, object]:
    """One run: colours tell the curves of all panels apart, grey is for those that stand alone. Several: colours tell runs
    apart, and earlier ones are wider, so that one that lies under another is seen."""
    place = panel.names.index(curve.name)
    if len(runs) == 1:
        return {"color": _color(panels, panel, place), "linestyle": "-", "linewidth": 1.8}
    number = list(runs).index(curve.run)
    width = 1.5 + 3 * (len(runs) - 1 - number) / len(runs)
    return {"color": f"C{number}", "linestyle": _STYLES[place % len(_STYLES)], "linewidth": width}


def _color(panels: Sequence[Panel], panel: Panel, place: int) -> str:
    if panel is not panels[0] and len(panel.names) == 1:
        return "dimgrey"
    before = [p for p in panels[: panels.index(panel)] if len(p.names) > 1 or p is panels[0]]
    return f"C{sum(len(p.names) for p in before) + place}"


def html_of(runs: Runs, target: Path, title: str, panels: Sequence[Panel], log_scale: bool = False) -> Path:
    """Write one page that needs nothing else, also no network: curves to zoom, with the values under the mouse.

    Raises: UsageError without plotly.
    """
    try:
        from plotly import colors, graph_objects, subplots
    except ImportError:
        raise UsageError("--html: needs plotly; pip install 'swiftlite[html]'") from None
    heights = [2] + [1] * (len(panels) - 1)
    figure = subplots.make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.2 / sum(heights),
        row_heights=heights, subplot_titles=[panel.title for panel in panels],
    )  # fmt: skip
    palette, named = colors.qualitative.D3, set()
    for row, panel in enumerate(panels, 1):
        for curve in curves_of(runs, panel):
            place = panel.names.index(curve.name)
            label = curve.run if len(runs) > 1 else curve.name
            if len(runs) > 1:
                line = {"color": palette[list(runs).index(curve.run) % len(palette)], "dash": _DASHES[place % 3]}
            else:
                color = _color(panels, panel, place)
                line = {"color": palette[int(color[1:]) % len(palette)] if color[0] == "C" else color}
            listed = label not in named and (len(runs) > 1 or len(panel.names) > 1)
            shared = {"legendgroup": label, "name": label, "line": line, "x": curve.steps, "mode": "lines"}
            if curve.smooth is not None:
                pale = graph_objects.Scatter(y=curve.values, opacity=0.3, showlegend=False, hoverinfo="skip", **shared)
                figure.add_trace(pale, row=row, col=1)
            said = f"%{{y:.5g}} {html.escape(' '.join(filter(None, (curve.run, curve.name))))}<extra></extra>"
            strong = graph_objects.Scatter(
                y=curve.smooth or curve.values, showlegend=listed, hovertemplate=said, **shared
            )
            figure.add_trace(strong, row=row, col=1)
            named.add(label)
    if log_scale:
        figure.update_yaxes(type="log", row=1, col=1)
    figure.update_xaxes(title_text="step (updates of the weights)", row=len(panels), col=1)
    figure.update_layout(
        title=html.escape(title), height=190 * sum(heights) + 160, hovermode="x unified", template="plotly_white"
    )
    write_text_atomic(target, figure.to_html(include_plotlyjs=True, config={"displaylogo": False}))
    return target


def title_of(directory: Path) -> str:
    """`run: MODEL, lora, DATA, 2026-11-29`, as args.json and the log's date say."""
    try:
        said = json.loads((directory / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        said = {}
    if not isinstance(said, dict):
        said = {}
    model = Path(str(said.get("model") or said.get("mcore_model") or "")).name
    data = [Path(str(name)).name for name in said.get("dataset") or said.get("cached_dataset") or []]
    log = directory / JSONL
    day = date.fromtimestamp(log.stat().st_mtime).isoformat() if log.exists() else ""
    parts = [short(model, _LABEL), str(said.get("train_type") or ""), short(some(data, 3), _LABEL), day]
    return f"{short(directory.resolve().name, _LABEL)}: {', '.join(filter(None, parts))}"


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


# What the log says of how a run ended.
_ENDED = ("step", "loss", "eval_loss", "rewards/accuracies", "tokens_per_second", "mfu", "memory_gib", "elapsed_s")


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
        logger.info("%s: %s", name, ", ".join(f"{key} {merged[key]:.6g}" for key in _ENDED if key in merged))
    panels = panels_of(runs, args.panels)
    first = Path(args.runs[0])
    title = title_of(first if first.is_dir() else first.parent) if len(runs) == 1 else ", ".join(runs)
    target = Path(args.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    plot = plot_runs(runs, target, title, panels, args.log_scale)
    if plot is None:
        raise UsageError("nothing to plot: the runs have no log lines yet, or matplotlib is missing")
    logger.info("wrote %s", plot)
    if args.html:
        page = Path(args.html)
        page.parent.mkdir(parents=True, exist_ok=True)
        logger.info("wrote %s", html_of(runs, page, title, panels, args.log_scale))
    return {"plot": str(plot), "runs": last}
