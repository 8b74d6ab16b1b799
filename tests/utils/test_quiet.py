"""Remarks of other libraries, and bars where nobody watches a terminal."""

from __future__ import annotations

import logging
import sys
import warnings

import pytest

from swiftlite.utils.progress import progress_bar
from swiftlite.utils.quiet import REMARKS, quiet


@pytest.mark.parametrize(
    "text, is_shown",
    [
        ("Apex is not installed. Falling back to Torch Norm", False),
        ("`torch.distributed.all_gather_into_tensor` is deprecated. Please use another", False),
        ("`is_gradient_checkpointing` is deprecated and will be removed in v6.", False),
        ("Grad strides do not match bucket view strides. This may indicate", False),
        ("When using sequence parallelism it is recommended to set the environment variable", True),
        ("lr_scheduler.step() before optimizer.step()", True),
    ],
)
def test_only_what_the_table_names_is_left_out(text: str, is_shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL", "TQDM_DELAY"):
        monkeypatch.setenv(name, "1")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet()
        warnings.warn(text, UserWarning, stacklevel=1)
    assert bool(seen) == is_shown
    assert all(remark.reason for remark in REMARKS)


def test_log_lines_of_a_library(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with warnings.catch_warnings():
        quiet()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes")
    logging.getLogger("megatron.core.dist_checkpointing.serialization").warning(
        "Overwriting old incomplete / corrupted checkpoint..."
    )
    logger.warning("another")
    assert [record.message for record in caplog.records] == ["another"]


def test_a_bar_without_a_terminal_writes_lines_seldom(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in progress_bar(range(100), desc="rows"):
        pass
    assert capsys.readouterr().err == ""  # less than a minute
    monkeypatch.setattr("swiftlite.utils.progress.BAR_SECONDS", 0)
    with progress_bar(total=2, desc="train") as bar:
        bar.update(1)
        bar.update(1)
    said = capsys.readouterr().err
    assert "\r" not in said and "train: 100%" in said.splitlines()[-1]
