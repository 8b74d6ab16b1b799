"""Layouts of two GPUs with Transformer Engine and NCCL: the steps are those of one GPU within the noise of bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from swiftlite.cli.main import main
from swiftlite.train.plot import read_run
from tests.gpu.test_te import bf16_model, config
from tests.rows import UNEVEN_PAIRS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

PACKED = ["--packing", "true", "--max_length", "256", "--micro_batch_size", "1", "--global_batch_size", "2"]
SAMPLES = ["--max_length", "256", "--micro_batch_size", "2", "--global_batch_size", "8"]
TP = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
PP = ["--pipeline_model_parallel_size", "2", "--decoder_first_pipeline_num_layers", "1"]
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


Curve = tuple[list[float], list[float]]  # loss and gradient norm of each step


class Runs:
    """8 steps on the same 8 rows. What one GPU does is run once for the cases that compare with it."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.alone: dict[tuple[str, ...], Curve] = {}

    def words(self, case: str, output: Path) -> tuple[list[str], list[str]]:
        """(of the command and its model, data and output; of the case's own flags)"""
        command, family, flags, _ = CASES[case]
        model, data = self.root / family, self.root / "data.jsonl"
        if not model.exists():
            bf16_model({**config(f"{family}:default"), "initializer_range": 0.02}, model, self.tokenizer)
            data.write_text("".join(json.dumps(row) + "\n" for row in UNEVEN_PAIRS[:8]))
        words = {"model": model, "model_type": family, "template": "chatml", "dataset": data, "train_iters": 8, "lr": 1e-3,
                 "logging_steps": 1, "report_to": "none", "save_weights_only": "true", "output_dir": output}  # fmt: skip
        return [*command.split(), *(word for name, value in words.items() for word in (f"--{name}", str(value)))], flags

    def one(self, case: str) -> Curve:
        key = (*CASES[case][:2], *CASES[case][2])
        if key not in self.alone:
            output = self.root / f"one-{len(self.alone)}"
            common, flags = self.words(case, output)
            assert main([*common, *flags]) == 0
            self.alone[key] = curve(output)
        return self.alone[key]

    def two(self, case: str) -> Curve:
        output = self.root / case.replace(" ", "-")
        common, flags = self.words(case, output)
        words = [sys.executable, "-m", "swiftlite", *common, *flags, *CASES[case][3]]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"NPROC_PER_NODE": "2"})
        assert done.returncode == 0, done.stderr[-3000:]
        if common[0] == "sft" and not set(LORA) & set(flags):
            transformers.AutoModelForCausalLM.from_pretrained(output / "checkpoint-8")
        return curve(output)


def curve(output: Path) -> Curve:
    lines = [line for line in read_run(output / "logging.jsonl") if "loss" in line]
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("two"), tiny_tokenizer_dir)


@pytest.mark.parametrize("case", CASES)
def test_two_compute_what_one_does(case: str, runs: Runs) -> None:
    (one, norms), (two, others) = runs.one(case), runs.two(case)
    print(case, one, two, norms, others)
    assert (
        len(two) == 8 and two[0] == pytest.approx(one[0], rel=2e-3) and others[0] == pytest.approx(norms[0], rel=2e-2)
    )
    assert two == pytest.approx(one, rel=2e-2, abs=5e-3)
    assert one[-1] < 0.9 * one[0]
