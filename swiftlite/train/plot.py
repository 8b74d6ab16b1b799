"""Curves of runs: one run's PNG at its end; `swiftlite plot RUN [RUN ...]`, several in a PNG or a page to zoom."""

from __future__ import annotations

import html
import json
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
    Panel("gradient norm", ("grad_norm",)),
    Panel("throughput (tokens/s)", ("tokens_per_second",)),
    Panel("MFU (share of peak)", ("mfu",)),
)
# Of runs, or of one run's curves: ten strong ones, then ten pale ones.
_COLORS = (
    "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #7f7f7f #bcbd22 #17becf "
    "#aec7e8 #ffbb78 #98df8a #ff9896 #c5b0d5 #c49c94 #f7b6d2 #c7c7c7 #dbdb8d #9edae5"
).split()
_DASHES = ("solid", "dashed", "dotted")  # of the curves of one panel, where colours tell runs apart
_PLOTLY = {"solid": "solid", "dashed": "dash", "dotted": "dot"}
_DOTS = 50  # points below which each of them is marked
_STEPS = "step (updates of the weights)"
_SMOOTHED = "pale: each log line, strong: running mean"
_FAR = 0x2E80  # from here on, letters are East Asian: the default font lacks them, and one of these has them
_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei")
_LONG = 100  # points from which a curve is drawn pale, with its running mean over it
_LABEL = 60  # characters of a model's, data set's or run's name
_HOVER = 30  # last characters of a run's name under the mouse: a phone has no room for more


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
    value = line.get(name)
    return name != "step" and isinstance(value, int | float) and math.isfinite(value)


def curves_of(runs: Runs, panel: Panel) -> list[Curve]:
    curves = []
    for run, history in runs.items():
        for name in panel.names:
            points = [(int(str(line["step"])), float(str(line[name]))) for line in history if _is_curve(line, name)]
            if points:
                steps, values = [step for step, _ in points], [value for _, value in points]
                noisy = len(values) >= _LONG and min(values) < max(values)
                smooth = running_mean(values) if noisy and name != "lr" and not name.startswith("eval_") else None
                curves.append(Curve(run, name, steps, values, smooth))
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
        from matplotlib.ticker import LogLocator, MaxNLocator
    except ImportError:
        logger.warning("matplotlib is not installed, so no plot is drawn: pip install matplotlib")
        return None
    heights = [2] + [1] * (len(panels) - 1)
    figure = Figure(figsize=(9, 1.0 + 1.9 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    # One legend: runs by their colours, then, grey, what lines mean in each of them.
    entries = {short(run, _LABEL): Line2D([], [], color=_color_of(i)) for i, run in enumerate(runs) if len(runs) > 1}
    smoothed = False
    for number, (axis, panel) in enumerate(zip(axes, panels, strict=True)):
        for curve in curves_of(runs, panel):
            look = _look(runs, panels, panel, curve)
            marker = "." if len(curve.steps) < _DOTS else None
            if curve.smooth is not None:
                smoothed = True
                axis.plot(curve.steps, curve.values, **{**look, "linewidth": 0.8}, alpha=0.3)
                axis.plot(curve.steps, curve.smooth, **look)
            else:
                axis.plot(curve.steps, curve.values, marker=marker, **look)
            if len(panel.names) > 1:
                color, dashes = "grey" if len(runs) > 1 else str(look["color"]), str(look["linestyle"])
                entries.setdefault(curve.name, Line2D([], [], color=color, linestyle=dashes))  # type: ignore[arg-type]
        axis.set_title(panel.title, loc="left", fontsize="medium")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        if log_scale and number == 0:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            axis.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5, 7) if high < 30 * low else (2, 5)))
            axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[-1].set_xlabel(f"{_STEPS}; {_SMOOTHED}" if smoothed else _STEPS)
    lines = textwrap.fill(title or some(list(runs), 3), 90, break_on_hyphens=False)
    fonts = _fonts("".join([lines, *runs]))
    if entries:
        prop = {"family": fonts, "size": "small"}
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=2, prop=prop)
    figure.suptitle(lines, fontfamily=fonts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing")  # boxes, where no font has the letter
        figure.savefig(target, dpi=120)
    return target


def _fonts(text: str) -> list[str]:
    from matplotlib import font_manager

    installed = font_manager.get_font_names() if any(ord(letter) >= _FAR for letter in text) else []
    return ["sans-serif", *(font for font in _FONTS if font in installed)]


def _look(runs: Runs, panels: Sequence[Panel], panel: Panel, curve: Curve) -> dict[str, object]:
    """One run: colours tell the curves of all panels apart, grey is for those that stand alone. Several: colours tell runs
    apart, and earlier ones are wider, so that one that lies under another is seen."""
    place = panel.names.index(curve.name)
    if len(runs) == 1:
        return {"color": _color(panels, panel, place), "linestyle": "solid", "linewidth": 1.8}
    number = list(runs).index(curve.run)
    width = 1.3 + 2 * (len(runs) - 1 - number) / len(runs)
    return {"color": _color_of(number), "linestyle": _DASHES[place % len(_DASHES)], "linewidth": width}


def _color_of(number: int) -> str:
    return _COLORS[number % len(_COLORS)]


def _color(panels: Sequence[Panel], panel: Panel, place: int) -> str:
    if panel is not panels[0] and len(panel.names) == 1:
        return "dimgrey"
    before = [p for p in panels[: panels.index(panel)] if len(p.names) > 1 or p is panels[0]]
    return _color_of(sum(len(p.names) for p in before) + place)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body{{font:14px sans-serif;margin:1em;color:#222;background:#fff}} h1{{font-size:1.2em;overflow-wrap:anywhere}}
p{{margin-bottom:30px}} .modebar{{top:-26px !important}}
@media (prefers-color-scheme: dark) {{
  body{{color:#ddd;background:#171717}} .plotly-graph-div{{filter:invert(.91) hue-rotate(180deg)}}
}}</style></head><body><h1>{title}</h1><p>{said}</p>
{figure}
</body></html>
"""
# Fingers scroll the page, until they choose to zoom.
_TOUCH = "if (matchMedia('(pointer: coarse)').matches) Plotly.relayout('{plot_id}', {dragmode: false});"


def html_of(runs: Runs, target: Path, title: str, panels: Sequence[Panel], log_scale: bool = False) -> Path:
    """Write one page that needs nothing else, also no network: curves to zoom, with the values under the mouse.

    Raises: UsageError without plotly.
    """
    try:
        from plotly import graph_objects, subplots
    except ImportError:
        raise UsageError("--html: needs plotly; pip install 'swiftlite[html]'") from None
    heights = [2] + [1] * (len(panels) - 1)
    figure = subplots.make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.2 / sum(heights),
        row_heights=heights, subplot_titles=[html.escape(panel.title) for panel in panels],
    )  # fmt: skip
    figure.update_annotations(x=0, xanchor="left", font_size=14)
    curves = {panel: curves_of(runs, panel) for panel in panels}
    listed: set[str] = set()
    for row, panel in enumerate(panels, 1):
        for curve in curves[panel]:
            for trace in _traces(runs, panel, curve, _look(runs, panels, panel, curve), listed):
                figure.add_trace(graph_objects.Scatter(trace), row=row, col=1)
    figure.update_yaxes(tickformat=".5~g")
    if log_scale:
        figure.update_yaxes(type="log", row=1, col=1)
    steps = [step for panel in panels for curve in curves[panel] for step in curve.steps]
    edge = max((max(steps) - min(steps)) / 50, 0.1)
    figure.update_xaxes(range=[min(steps) - edge, max(steps) + edge], unifiedhovertitle_text="step %{x}")
    figure.update_xaxes(title_text=_STEPS, row=len(panels), col=1)
    size = 190 * sum(heights)
    figure.update_layout(
        height=size + 100, margin={"l": 60, "r": 15, "t": 40, "b": 50}, hovermode="x unified", template="plotly_white",
        legend={"orientation": "h", "y": 1 + 30 / size, "yanchor": "bottom"},
    )  # fmt: skip
    said = [
        "Drag to zoom all panels (fingers first tap the glass), double-click to go back; click a name to hide its curves"
    ]
    said += [_SMOOTHED] * any(curve.smooth for panel in panels for curve in curves[panel])
    if len(runs) > 1:
        many = [panel.names for panel in panels if len(panel.names) > 1]
        said += [f"{name}: {_DASHES[i % len(_DASHES)]}" for names in many for i, name in enumerate(names)]
    # Without the button that sends the data to a service.
    config = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
    config["modeBarButtonsToRemove"] = ["select2d", "lasso2d"]
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config=config, post_script=_TOUCH)
    page = _PAGE.format(title=html.escape(title), said=html.escape("; ".join(said)), figure=drawn)
    write_text_atomic(target, page)
    return target


def _traces(runs: Runs, panel: Panel, curve: Curve, look: Mapping[str, object], listed: set[str]) -> Iterator[Json]:
    """The curve as plotly has it, before it what it smooths. listed: names of the legend so far; grows."""
    label = curve.run if len(runs) > 1 else curve.name
    line = {"color": look["color"], "dash": _PLOTLY[str(look["linestyle"])]}
    shared = {"legendgroup": label, "name": html.escape(short(label, _LABEL)), "x": curve.steps}
    if curve.smooth is not None:
        yield {
            "y": curve.values, "mode": "lines", "opacity": 0.3, "showlegend": False, "hoverinfo": "skip",
            "line": {**line, "width": 1}, **shared,
        }  # fmt: skip
    names = (curve.run[-_HOVER:], curve.name) if len(runs) > 1 else (curve.name,)
    yield {
        "y": curve.smooth or curve.values, "mode": "lines+markers" if len(curve.steps) < _DOTS else "lines",
        "showlegend": label not in listed and (len(runs) > 1 or len(panel.names) > 1), "line": line,
        "marker": {"size": 4}, "hovertemplate": f"%{{y:.5g}} {html.escape(' '.join(names))}%{{_xother}}<extra></extra>",
        **shared,
    }  # fmt: skip
    listed.add(label)


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
    title = title_of(first if first.is_dir() else first.parent) if len(runs) == 1 else some(list(runs), 3)
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
