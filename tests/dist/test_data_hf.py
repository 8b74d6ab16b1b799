"""`swiftlite sft` on two data-parallel processes sees the samples of one, packed and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from tests.dist.launch import run_cases

pytestmark = pytest.mark.dist

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "The capital is Paris. " * (i % 4)}]}
    for i in range(40)
]  # fmt: skip
WAYS = {
    "packed": ["--packing", "true"],
    "streamed-packed": ["--packing", "true", "--streaming", "true", "--shuffle_buffer_size", "16"],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_equal_one(way: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def words(output: Path) -> list[str]:
        return ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data),
                "--train_iters", "8", "--global_batch_size", "4", "--micro_batch_size", "1", "--max_length", "150",
                "--torch_dtype", "float32", "--lr", "1e-3", "--logging_steps", "1", "--save_steps", "100",
                "--save_weights_only", "true", "--output_dir", str(output), *WAYS[way]]  # fmt: skip

    def losses(output: Path) -> list[float]:
        return [line["loss"] for line in read_run(output) if "loss" in line]

    sft_main(words(tmp_path / "one"))
    code, errors = run_cases(2, [("sft", words(tmp_path / "two"), None)], "tests.dist.worker_hf")
    assert code == 0, errors[-3000:]
    assert len(losses(tmp_path / "one")) == 8
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
