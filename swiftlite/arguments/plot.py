"""Arguments of `swiftlite plot`."""

from __future__ import annotations

from typing import ClassVar

from swiftlite.arguments.parser import Arguments, arguments, field
from swiftlite.utils.errors import UsageError


@arguments
class PlotArguments(Arguments):
    """Plot: curves of training runs in one picture"""

    POSITIONAL: ClassVar[str | None] = "runs"

    runs: list[str] = field([], "output directories of runs, or their logging.jsonl", path=True)
    output: str = field("runs.png", "picture that is written", aliases=["output_path"], path=True)
    panels: list[str] = field(
        [], "what is drawn: loss, lr, grad_norm or other names in logging.jsonl (default: what is known)"
    )
    log_scale: bool = field(False, "logarithmic axis of the first panel")
    html: str | None = field(None, "also write a page to zoom, which needs nothing else", path=True)
    debug: bool = field(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise UsageError("plot: name at least one run: swiftlite plot RUN [RUN ...]")
