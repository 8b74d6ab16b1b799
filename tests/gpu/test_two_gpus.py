"""Layouts of two GPUs with Transformer Engine and NCCL: the steps are those of one GPU within the noise of bf16."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftlite.train.plot import read_run
from tests.families.cases import build_hf
from tests.gpu.test_te import config
from tests.rows import UNEVEN_PAIRS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PACKED = ["--packing", "true", "--max_length", "256", "--micro_batch_size", "1", "--global_batch_size", "2"]
SAMPLES = ["--max_length", "256", "--micro_batch_size", "2", "--global_batch_size", "8"]
TP = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
PP = ["--pipeline_model_parallel_size", "2"]
EP = ["--expert_model_parallel_size", "2"]
CP = ["--context_parallel_size", "2", "--cp_comm_type"]
LORA = ["--train_type", "lora", "--lora_dropout", "0"]
# command, family, flags of both runs, flags of the one on two GPUs
CASES: dict[str, tuple[str, str, list[str], list[str]]] = {
    "dp2": ("megatron sft", "qwen3", SAMPLES, []),
    "tp2": ("megatron sft", "qwen3", SAMPLES, TP),
    "pp2": ("megatron sft", "qwen3", SAMPLES, PP),
    "cp2 p2p": ("megatron sft", "qwen3", SAMPLES, [*CP, "p2p"]),
    "cp2 all_gather": ("megatron sft", "qwen3", SAMPLES, [*CP, "all_gather"]),
    "cp2 a2a": ("megatron sft", "qwen3", SAMPLES, [*CP, "a2a"]),
    "cp2 packed": ("megatron sft", "qwen3", PACKED, [*CP, "p2p"]),
    "cp2 packed a2a": ("megatron sft", "qwen3", PACKED, [*CP, "a2a"]),
    "cp2 mla": ("megatron sft", "moonlight", SAMPLES, [*CP, "p2p"]),
    "cp2 lora": ("megatron sft", "qwen3", [*SAMPLES, *LORA], [*CP, "p2p"]),
    "cp2 dpo": ("megatron dpo", "qwen3", [*SAMPLES, "--rpo_alpha", "1"], [*CP, "p2p"]),
    "ep2": ("megatron sft", "glm4_5", SAMPLES, EP),
    "ep2 cp2": ("megatron sft", "glm4_5", SAMPLES, [*EP, *CP, "p2p"]),
    "fsdp": ("sft", "qwen3", SAMPLES, ["--fsdp", "full_shard"]),
    "fsdp offload": ("sft", "qwen3", SAMPLES, ["--fsdp", "full_shard", "offload"]),
    "fsdp lora": ("sft", "qwen3", [*SAMPLES, *LORA], ["--fsdp", "full_shard"]),
    "fsdp sp2": ("sft", "qwen3", SAMPLES, ["--fsdp", "full_shard", "--sequence_parallel_size", "2"]),
}


def curve(name: str, gpus: int, root: Path, tokenizer: Path) -> list[list[float]]:
    """Loss and gradient norm of 8 steps."""
    command, family, flags, more = CASES[name]
    model, data, output = root / "model", root / "data.jsonl", root / str(gpus)
    if not model.exists():
        build_hf({**config(f"{family}:default"), "initializer_range": 0.02}, model, dtype=torch.bfloat16)
        for file in tokenizer.iterdir():
            shutil.copy(file, model)
        stated = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**stated, "torch_dtype": "bfloat16"}))
        data.write_text("".join(json.dumps(row) + "\n" for row in UNEVEN_PAIRS[:8]))
    words = ["--model", str(model), "--model_type", family, "--template", "chatml", "--dataset", str(data)]
    words += [
        "--train_iters",
        "8",
        "--lr",
        "1e-3",
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--save_weights_only",
    ]
    words += ["true", "--output_dir", str(output), *flags, *(more if gpus > 1 else [])]
    ranks = {"NPROC_PER_NODE": str(gpus)} if gpus > 1 else {}
    done = subprocess.run(
        [sys.executable, "-m", "swiftlite", *command.split(), *words],
        capture_output=True,
        text=True,
        env=os.environ | ranks,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "sft" == command:
        import transformers

        if "lora" not in flags:
            transformers.AutoModelForCausalLM.from_pretrained(output / "checkpoint-8")
    return [
        [line[key] for line in read_run(output / "logging.jsonl") if "loss" in line] for key in ("loss", "grad_norm")
    ]


@pytest.mark.parametrize("name", CASES)
def test_two_compute_what_one_does(name: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (one, norms), (two, others) = (curve(name, gpus, tmp_path, tiny_tokenizer_dir) for gpus in (1, 2))
    print(name, one, two, norms, others)
    assert (
        len(two) == 8 and two[0] == pytest.approx(one[0], rel=2e-3) and others[0] == pytest.approx(norms[0], rel=2e-2)
    )
    assert two == pytest.approx(one, rel=2e-2, abs=5e-3)
    assert one[-1] < 0.9 * one[0]
