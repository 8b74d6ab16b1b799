"""`swiftlite sft` on two data-parallel processes sees the samples of one, packed and streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
def test_two_processes_equal_one(way, tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def losses(processes: int) -> list[float]:
        output = tmp_path / str(processes)
        words = ["sft", "--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data),
                 "--train_iters", "8", "--global_batch_size", "4", "--micro_batch_size", "1", "--max_length", "150",
                 "--torch_dtype", "float32", "--lr", "1e-3", "--logging_steps", "1", "--save_steps", "100",
                 "--save_weights_only", "true", "--output_dir", str(output), *WAYS[way]]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        if processes > 1:
            environment["NPROC_PER_NODE"] = str(processes)
        done = subprocess.run(
            [sys.executable, "-m", "swiftlite", *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert losses(2) == pytest.approx(losses(1), rel=1e-5)
