"""What a run on either side says when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from swiftlite.train.intervals import Best
from swiftlite.utils.io import format_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import format_seconds

logger = get_logger()


def say_ended(
    step: int, loss: float | None, seconds: float, peak_memory: int, written: Iterable[Path], best: Best, stopped: bool
) -> None:
    """loss: of the last step; None where no step was left to do. peak_memory: bytes. stopped: by a signal."""
    if loss is None:
        logger.info("all %d steps were done before; nothing is left to do", step)
    else:
        logger.info(
            "%s step %d in %s; loss %.6g; peak memory %s", "stopped at" if stopped else "finished", step,
            format_seconds(seconds), loss, format_bytes(peak_memory),
        )  # fmt: skip
    for path in written:
        logger.info("wrote %s", path)
    if best.checkpoint:
        logger.info("best checkpoint by %s: %s", best.metric, best.root / best.checkpoint)
