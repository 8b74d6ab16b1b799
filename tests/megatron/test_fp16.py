"""fp16 on both sides: steps whose gradients overflow update nothing, are told and counted, and leave the schedule."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.llm.train import device
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers import optimizer
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.train.fp16 import HEADROOM
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import SwiftliteError
from tests.rows import preference_rows

# The latter has experts with an optimizer, and so a loss scale, of their own.
MODELS = {"qwen3": "qwen3", "glm4_moe": "glm4_5"}


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8)))

    def run(main: Any, family: str, output: str = "run", **flags: Any) -> list[dict[str, Any]]:
        settings = {
            "model": tiny_model(family), "model_type": MODELS[family], "dataset": data, "torch_dtype": "float16",
            "output_dir": tmp_path / output, "train_iters": 8, "global_batch_size": 4, "lr": 1e-3, "report_to": "none",
            "lr_decay_style": "linear", "logging_steps": 1, "save_steps": 4, **flags,
        }  # fmt: skip
        main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
        return read_run(tmp_path / output / "logging.jsonl")

    return run


def overflow_often(monkeypatch: pytest.MonkeyPatch, scale: float = 2.0**20) -> None:
    """Begin with that scale, and double it after each step."""
    for module in (optimizer, device):
        monkeypatch.setattr(module, "INITIAL_SCALE", scale)
        monkeypatch.setattr(module, "GROWTH_INTERVAL", 1)


SIDES = [(sft_main, "qwen3"), (megatron_sft_main, "qwen3"), (megatron_sft_main, "glm4_moe")]


@pytest.mark.parametrize(("main", "family"), SIDES)
def test_skipped_steps(
    main: Any, family: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    overflow_often(monkeypatch)
    with caplog.at_level(logging.WARNING):
        lines = train(main, family)
    skipped = [line["step"] for line in lines if "grad_norm" not in line]
    assert 2 <= len(skipped) <= 6
    done = 0
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        assert line["lr"] == pytest.approx(1e-3 * (1 - done / 8)), "the schedule waits"
        done += line["step"] not in skipped
        assert line["skipped_steps"] == line["step"] - done
        if after:
            found = main is megatron_sft_main and line["step"] == 1  # the scale that the first batch just allows
            factor = (0.5 if line["step"] in skipped else 2) / (HEADROOM if found else 1)
            assert after["loss_scale"] == line["loss_scale"] * factor
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"]
    assert sum("nothing is updated" in record.getMessage() for record in caplog.records) == len(skipped)
    assert "Infinity" not in (tmp_path / "run" / "logging.jsonl").read_text()
    # A run that resumes from step 4 has the scale, the schedule and the count of the one that was not stopped.
    newest = {"iter_0000008", "checkpoint-8"}
    for name in newest:
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    if main is megatron_sft_main:
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    again = train(main, family)
    for name in ("loss", "lr", "loss_scale", "skipped_steps"):
        assert [line[name] for line in again] == pytest.approx([line[name] for line in lines], rel=1e-6), name


@pytest.mark.parametrize(("main", "family"), SIDES)
def test_the_first_scale_is_sane(main: Any, family: str, train: Any) -> None:
    """Hardly a step is lost, and gradients are those of fp32."""
    lines = train(main, family, train_iters=2, save_strategy="no")
    full = train(main, family, "fp32", train_iters=1, save_strategy="no", torch_dtype="float32")
    assert lines[-1]["skipped_steps"] <= (2 if main is sft_main else 0)
    first = next(line for line in lines if "grad_norm" in line)
    assert first["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=0.02)


@pytest.mark.parametrize(("main", "family"), SIDES[:2])
def test_an_overflow_that_no_scale_mends_is_an_error(
    main: Any, family: str, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow_often(monkeypatch, 1.0)
    with pytest.raises(SwiftliteError, match="overflow fp16 with a loss scale of 1|diverged"):
        train(main, family, lr=1e30, clip_grad=0, train_iters=4)
