"""Runs of tiny models on either side, and what they logged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.train.plot import read_run

Lines = list[dict[str, Any]]


def values(lines: Lines, name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def model_of(tiny_model: Callable[..., Path], tiny_mla: Callable[[int], Path]) -> Callable[..., Path]:
    """model_of("qwen3", seed=1) -> a tiny model with an odd vocabulary; "mla": latent attention and experts."""

    def make(family: str, seed: int = 0, **overrides: Any) -> Path:
        if family == "mla":
            return tiny_mla(seed)
        return tiny_model(family, seed=seed, **{"vocab_size": 333, "initializer_range": 0.02, **overrides})

    return make


@pytest.fixture
def train(model_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Lines]:
    """train(main, output, rows, family, flag=value...) -> the lines of logging.jsonl; a flag that is None is left out."""

    def start(main: Any, output: str, rows: list[dict[str, Any]], family: str = "qwen3", **flags: Any) -> Lines:
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "model": model_of(family), "template": "qwen3", "dataset": data, "output_dir": tmp_path / output,
            "torch_dtype": "float32", "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "adam_eps": 1e-5,
            "train_iters": 4, "logging_steps": 1, "max_length": 200, "report_to": "none", **flags,
        }  # fmt: skip
        main([word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))])
        return read_run(tmp_path / output / "logging.jsonl")

    return start
