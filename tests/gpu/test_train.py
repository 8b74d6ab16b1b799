"""Training on a GPU in bf16 with Transformer Engine: the loss falls, and starts where Hugging Face's does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swiftlite.cli.main import main
from tests.gpu.test_te import bf16_model, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("case", ["qwen3:default", "glm4_5:default", "moonlight:default", "qwen3_5_moe:text"])
def test_sft_in_bf16(case: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    bf16_model(config(case), tmp_path / "hf", tiny_tokenizer_dir)
    row = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Swifty."}]}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 64))
    words = ["--model", str(tmp_path / "hf"), "--model_type", case.split(":")[0], "--template", "chatml"]
    words += ["--dataset", str(tmp_path / "train.jsonl"), "--train_iters", "30", "--lr", "1e-3", "--logging_steps", "1"]
    words += ["--global_batch_size", "8", "--micro_batch_size", "4", "--max_length", "200"]
    assert main(["megatron", "sft", *words, "--output_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/logging.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    back = ["--mcore_model", str(tmp_path / "run"), "--to_hf", "true", "--output_dir", str(tmp_path / "back")]
    assert main(["export", *back, "--test_convert_precision", "true", "--verify", "bitwise"]) == 0
