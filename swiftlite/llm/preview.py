"""`swiftlite preview`: rows as the model sees them: tokens, what is trained on, what is dropped and why, lengths, packing.

Needs a tokenizer and a template, no weights and no GPU.
"""

from __future__ import annotations

import html
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from swiftlite.arguments.preview import PreviewArguments
from swiftlite.checkpoint.resolve import as_arguments, resolve
from swiftlite.llm.dataset.loader import PlacedRow
from swiftlite.llm.dataset.packing import pack_in_order, pack_windows
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.rows import open_stream, read_rows
from swiftlite.llm.pipeline import prepare_template
from swiftlite.llm.preview_rows import Shown, Token, encoded, lengths_of, shown_of, told_beside, told_of
from swiftlite.llm.template.base import Template
from swiftlite.llm.template.parity import differences
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.io import write_text_atomic
from swiftlite.utils.logger import get_logger

_STREAMED_ROWS = 1000
_BINS = 12
_LENGTHS_PNG = "lengths.png"


@dataclass
class Preview:
    """What the report shows. lengths: tokens of every sample. shown: some samples."""

    title: str
    facts: list[str]
    table: list[str]
    dropped: list[str]
    shown: list[Shown]
    lengths: list[int]
    notes: list[str] = field(default_factory=list)


def make_preview(args: PreviewArguments, template: Template) -> Preview:
    """Read, encode and measure. Raises: DatasetError where no row can be used."""
    rejects = RejectsFile(Path(args.output_dir) / REJECTS_FILE if args.output_dir else None)
    limit = args.max_drop_ratio
    args.max_drop_ratio = 1.0  # told, not enforced
    rows = (
        list(_first_rows(args, rejects))
        if args.streaming
        else [row for part in read_rows(args, rejects) for row in part]
    )
    samples = encoded(args, rows, template, rejects)
    report, lengths = rejects.report, lengths_of(samples)
    report.total = samples.report.total + report.dropped - samples.report.dropped
    kept = [rows[i] for i in samples.row_indices]
    shown = [
        one for i in range(min(args.num_rows, len(samples))) for one in shown_of(args, template, samples, i, kept[i])
    ]
    facts = [*told_of(args, template, samples), *told_beside(args, kept)]
    found = list(differences(template))
    notes = [f"differs from the checkpoint's own chat template: {line}" for line in found[:3]]
    if found[3:]:
        notes.append(f"differs from it in {len(found[3:])} more kinds of conversations")
    if report.total and report.dropped > limit * report.total:
        notes.append(
            f"{report.dropped} of {report.total} rows dropped: training stops above --max_drop_ratio {limit:g}"
        )
    facts += [] if args.groups else list(_packing(args, lengths))
    dropped = [f"{reason}: {place}" for reason, places in report.examples.items() for place in places[1:]]
    return Preview(", ".join(args.dataset), facts, report.table().splitlines(), dropped, shown, lengths, notes)


def _first_rows(args: PreviewArguments, rejects: RejectsFile) -> Iterator[PlacedRow]:
    for place, row in islice(open_stream(args), _STREAMED_ROWS):
        if isinstance(row, RowError):
            rejects.write(place, row.reason, row.seen, row.row)
        else:
            yield PlacedRow(row, place)


def _packing(args: PreviewArguments, lengths: Sequence[int]) -> Iterator[str]:
    capacity = args.packing_length or args.max_length
    if capacity is None or max(lengths) > capacity:
        return
    in_order = args.packing_strategy == "sequential"
    sequences = pack_in_order(lengths, capacity) if in_order else pack_windows(lengths, capacity, args.data_seed or 0)
    used, alone = sum(lengths) / (len(sequences) * capacity), sum(lengths) / (len(lengths) * max(lengths))
    yield (
        f"packed sequences of {capacity} tokens: {len(sequences)}, fill rate {used:.1%}; padded to the longest sample "
        f"instead: {alone:.1%}"
    )


# ---- terminal ----

_DIM, _GREEN = "\033[2m", "\033[32m"
_YELLOW, _BOLD = "\033[33m", "\033[1m"
_RED, _END = "\033[31m", "\033[0m"


def as_text(preview: Preview, color: bool, show_ids: bool, width: int = 100) -> str:
    """The report for a terminal. Without colours, what is trained on stands between ⟦ and ⟧, with its weight if not 1."""

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_END}" if color and text else text

    lines = [paint(_BOLD, preview.title), *preview.facts]
    lines += [paint(_RED, f"note: {note}") for note in preview.notes]
    if _trains_tokens(preview):
        known = ((_GREEN, "trained on"), (_YELLOW, "with another weight than 1"), (_DIM, "not trained on"))
        key = ", ".join(paint(code, text) for code, text in known)
        lines += ["", key if color else "⟦trained on⟧, ⟦trained on with weight 2⟧×2, the rest is not trained on"]
    for shown in preview.shown:
        lines += ["", paint(_BOLD, f"row {shown.row}: {len(shown.tokens)} tokens, {shown.told}")]
        lines.append("".join(_run(text, weight, color, paint) for text, weight in _runs(shown.tokens)))
        if show_ids:
            lines += ["", f"{'token':>6} {'id':>8} {'weight':>7}  text"]
            lines += [f"{i:>6} {t.id:>8} {t.weight:>7g}  {t.text!r}" for i, t in enumerate(shown.tokens)]
    lines += ["", paint(_BOLD, "rows"), *preview.table]
    lines += [paint(_RED, f"  {line}") for line in preview.dropped]
    lines += ["", paint(_BOLD, "tokens per sample"), *histogram(preview.lengths, width)]
    return "\n".join(lines) + "\n"


def _trains_tokens(preview: Preview) -> bool:
    """Not where texts are read as a whole."""
    return any(token.weight for shown in preview.shown for token in shown.tokens)


def _runs(tokens: Sequence[Token]) -> Iterator[tuple[str, float]]:
    """Neighbours of one weight as one text."""
    text, weight = "", tokens[0].weight if tokens else 0.0
    for token in tokens:
        if token.weight != weight:
            yield text, weight
            text, weight = "", token.weight
        text += token.text
    yield text, weight


def _run(text: str, weight: float, color: bool, paint: Callable[[str, str], str]) -> str:
    if color:
        code = _DIM if not weight else _GREEN if weight == 1 else _YELLOW
        # Colours end at line breaks in some terminals.
        return "\n".join(paint(code, line) for line in text.split("\n")) + (
            f"×{weight:g}" if weight not in (0, 1) else ""
        )
    return text if not weight else f"⟦{text}⟧" + ("" if weight == 1 else f"×{weight:g}")


def _counts(lengths: Sequence[int]) -> tuple[list[int], int, int]:
    """(samples per bin, first length, width of a bin)."""
    low, high = min(lengths), max(lengths)
    step = max(1, -(-(high - low + 1) // _BINS))
    counts = [0] * (-(-(high - low + 1) // step))
    for length in lengths:
        counts[(length - low) // step] += 1
    return counts, low, step


def histogram(lengths: Sequence[int], width: int = 100) -> list[str]:
    """Lines of a bar chart of lengths, then median and longest."""
    counts, low, step = _counts(lengths)
    room = max(10, width - 34)
    lines = []
    for i, count in enumerate(counts):
        start = low + i * step
        lines.append(f"{_bin(start, step):>15} {count:>8} {'█' * round(room * count / max(counts))}".rstrip())
    return [*lines, _extent(lengths)]


def _bin(start: int, step: int) -> str:
    return f"{start}" if step == 1 else f"{start}-{start + step - 1}"


def _extent(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return f"shortest {ordered[0]}, median {ordered[len(ordered) // 2]}, 95 % up to {p95}, longest {ordered[-1]}"


# ---- files ----


def draw_lengths(lengths: Sequence[int], path: Path) -> Path | None:
    """The histogram as a PNG. Returns: the file, None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        get_logger().warning("matplotlib is not installed, so no histogram is drawn: pip install matplotlib")
        return None
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.hist(lengths, bins=min(50, max(1, max(lengths) - min(lengths) + 1)), color="#2a7")
    axis.set_xlabel("tokens per sample")
    axis.set_ylabel("samples")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


# Box shadows take no room: letters of different tokens join as they do in the text.
_STYLE = """:root{color-scheme:light dark;--pre:#f7f7f7;--off:#666;--one:#cdf2d6;--other:#ffe9a8;--note:#b00}
@media (prefers-color-scheme:dark){:root{--pre:#222;--off:#999;--one:#1c4d2c;--other:#5a4700;--note:#f77}}
body{font:14px sans-serif;max-width:70em;margin:2em auto;padding:0 1em;overflow-wrap:anywhere}
pre{white-space:pre-wrap;background:var(--pre);padding:1em;border-radius:6px;line-height:1.6}
pre span{box-shadow:inset 1px 0 #8886}span:empty{padding-left:2px}
i::before{content:"\\21B5";opacity:.4}
.w0{color:var(--off)}.w1{background:var(--one)}.wx{background:var(--other)}.note{color:var(--note)}
table{border-collapse:collapse;width:100%}td,th{padding:.1em .8em .1em 0;text-align:right;white-space:nowrap}
td:last-child{width:100%}td div{background:#2a7;height:1em}"""


def as_html(preview: Preview) -> str:
    """The report as one HTML page without anything from elsewhere; ids and weights appear under the pointer."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>preview of {html.escape(preview.title)}</title>",
        f"<style>{_STYLE}</style><h1>{html.escape(preview.title)}</h1>",
        *(f"<p>{html.escape(fact)}</p>" for fact in preview.facts),
        *(f"<p class='note'>{html.escape(note)}</p>" for note in preview.notes),
    ]
    if _trains_tokens(preview):
        parts.append(
            "<p><span class='w1'>trained on</span> <span class='wx'>another weight than 1</span> "
            "<span class='w0'>not trained on</span></p>"
        )
    for shown in preview.shown:
        heading = html.escape(f"row {shown.row}: {len(shown.tokens)} tokens, {shown.told}")
        parts.append(f"<h2>{heading}</h2><pre>{''.join(map(_html_token, shown.tokens))}</pre>")
    parts.append("<h2>rows</h2><pre>" + html.escape("\n".join(preview.table + preview.dropped)) + "</pre>")
    parts.append("<h2>tokens per sample</h2>" + _html_histogram(preview.lengths) + "</html>")
    return "\n".join(parts) + "\n"


def _html_token(token: Token) -> str:
    kind = "w0" if not token.weight else "w1" if token.weight == 1 else "wx"
    # Line breaks with a sign, so that it is seen whether they are trained on.
    text = html.escape(token.text).replace("\n", "<i>\n</i>")
    return f"<span class='{kind}' title='id {token.id}, weight {token.weight:g}'>{text}</span>"


def _html_histogram(lengths: Sequence[int]) -> str:
    counts, low, step = _counts(lengths)
    rows = (
        f"<tr><td>{_bin(low + i * step, step)}<td>{count}<td><div style='width:{100 * count / max(counts):.1f}%'></div>"
        for i, count in enumerate(counts)
    )
    return f"<table><tr><th>tokens<th>samples<th>{''.join(rows)}</table><p>{_extent(lengths)}</p>"


def preview_main(args: PreviewArguments | Sequence[str]) -> Preview:
    """Print the report; with --output_dir also write lengths.png and rejects.jsonl, with --html FILE the page.

    Args: args: PreviewArguments, or words as typed. Returns: what is shown.
    Raises: DatasetError where no row can be used.
    """
    args = as_arguments(PreviewArguments, args)
    resolve(args, download_model=False)
    strict, args.strict_template = args.strict_template, False
    template = prepare_template(args)
    preview = make_preview(args, template)
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    sys.stdout.write(as_text(preview, color, args.show_ids, shutil.get_terminal_size((100, 24)).columns))
    if args.output_dir:
        drawn = draw_lengths(preview.lengths, Path(args.output_dir) / _LENGTHS_PNG)
        get_logger().info("wrote %s", drawn or args.output_dir)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(Path(args.html), as_html(preview))
        get_logger().info("wrote %s", args.html)
    differing = [note for note in preview.notes if note.startswith("differs")]
    if strict and differing:
        raise DatasetError(f"--strict_template true: the template {differing[0]}")
    return preview
