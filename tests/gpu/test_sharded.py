"""`--fsdp full_shard` on one GPU: the path of NCCL, bf16 and offload; as many ranks as there are compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from tests.rows import preference_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("sharding", [["full_shard"], ["full_shard", "offload"], ["shard_grad_op"]])
@pytest.mark.parametrize("tuner", [["--lr", "1e-3"], ["--train_type", "lora", "--lora_dropout", "0", "--lr", "1e-2"]])
def test_one_gpu(sharding: list[str], tuner: list[str], tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(15)))
    words = ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--template", "qwen3", "--dataset", str(data),
             "--split_dataset_ratio", "0.2", "--train_iters", "8", "--global_batch_size", "4", "--torch_dtype", "bfloat16",
             "--logging_steps", "1", "--eval_steps", "4", "--save_steps", "4", "--report_to", "none", *tuner]  # fmt: skip
    found = {}
    for name, more in {"whole": [], "sharded": ["--fsdp", *sharding]}.items():
        sft_main([*words, "--output_dir", str(tmp_path / name), *more])
        found[name] = [line.get("loss", line.get("eval_loss")) for line in read_run(tmp_path / name / "logging.jsonl")]
    assert found["sharded"][0] == pytest.approx(found["whole"][0], rel=1e-4)
    assert found["sharded"] == pytest.approx(found["whole"], rel=5e-3)
    if "lora" not in tuner:
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sharded/checkpoint-8")
