"""Both sides measure the same: names of the values, and the operations, tokens and samples that they count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.llm.train.dpo import dpo_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.dpo import megatron_dpo_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.train.plot import read_run
from tests.rows import preference_rows

SIDES: dict[str, tuple[Any, Any]] = {"sft": (sft_main, megatron_sft_main), "dpo": (dpo_main, megatron_dpo_main)}
ROWS = preference_rows(10)


@pytest.mark.parametrize(
    ("training", "family", "train_type"),
    [("sft", "qwen3", "full"), ("sft", "glm4_moe", "lora"), ("dpo", "glm4_moe", "full"), ("dpo", "qwen3", "lora")],
)
def test_both_sides_measure_the_same(
    training: str, family: str, train_type: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {
        "model": tiny_model(family), "model_type": {"qwen3": "qwen3", "glm4_moe": "glm4_5"}[family], "dataset": data,
        "split_dataset_ratio": 0.2, "eval_steps": 2, "train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2,
        "logging_steps": 1, "torch_dtype": "float32", "report_to": "none", "train_type": train_type,
        "lora_dropout": 0, "save_strategy": "no",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    lines = []
    for number, main in enumerate(SIDES[training]):
        main([*words, "--output_dir", str(tmp_path / str(number))])
        lines.append(read_run(tmp_path / str(number) / "logging.jsonl"))
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        if "loss" in one:
            for name in ("tflops", "padded_tokens_per_second", "samples_per_second"):  # per token: no clock in it
                ratios = [line[name] / line["tokens_per_second"] for line in (one, two)]
                assert ratios[0] == pytest.approx(ratios[1], rel=1e-9), name
            assert one["padding_share"] == pytest.approx(two["padding_share"]) and 0 < one["padding_share"] < 1
        else:
            assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-5)
