"""FP8 and optimizer states of other kinds on a GPU with Transformer Engine: curves near those of bf16, plain checkpoints."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from swiftlite.cli.main import main
from swiftlite.train.plot import read_run
from tests.gpu.test_te import bf16_model, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CASES = {"dense": "qwen3:default", "moe": "glm4_5:default"}
STEPS = 50
WORDS = "the capital of France is Paris and rivers run to the sea while seven times eight is fifty six".split()


@pytest.fixture
def train(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[..., list[float]]:
    """`train("moe", "name", *flags)` -> the loss of each step."""
    draw = random.Random(0)
    rows = [
        {"messages": [{"role": "user", "content": f"Write {n} words."},
                      {"role": "assistant", "content": " ".join(draw.choices(WORDS, k=n))}]}
        for n in draw.choices(range(5, 40), k=64)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(kind: str, output: str, *flags: str) -> list[float]:
        model = tmp_path / kind
        if not model.exists():
            wide = {"moe_intermediate_size": 128} if kind == "moe" else {}
            bf16_model({**config(CASES[kind]), **wide}, model, tiny_tokenizer_dir)
        words = ["--model", str(model), "--model_type", CASES[kind].split(":")[0], "--template", "chatml"]
        words += ["--dataset", str(tmp_path / "train.jsonl"), "--train_iters", str(STEPS), "--lr", "1e-3"]
        words += ["--logging_steps", "1", "--global_batch_size", "8", "--micro_batch_size", "4", "--max_length", "256"]
        words += ["--save_steps", str(STEPS // 2), "--report_to", "none", "--output_dir", str(tmp_path / output)]
        assert main(["megatron", "sft", *words, *flags]) == 0
        return [line["loss"] for line in read_run(tmp_path / output / "logging.jsonl") if "loss" in line]

    return run


def distance(one: list[float], two: list[float]) -> float:
    """Mean relative difference of two curves."""
    return sum(abs(a - b) / a for a, b in zip(one, two, strict=True)) / len(one)


FP8 = ["--fp8_format", "e4m3", "--fp8_recipe"]


@pytest.mark.parametrize("kind", CASES)
def test_fp8_descends_as_bf16_does(kind: str, train: Callable[..., Any], tmp_path: Path) -> None:
    """Each recipe over 50 steps, with recomputation too; what is saved is plain bf16 and comes back to Hugging Face."""
    plain = train(kind, "plain")
    assert plain[-1] < 0.7 * plain[0]
    runs = {
        "blockwise": [*FP8, "blockwise", "--fp8_param_gather", "true", "--save_safetensors", "true"],
        "tensorwise": [*FP8, "tensorwise"],
        "delayed": ["--fp8_format", "hybrid", "--recompute", "full"],
    }
    for name, flags in runs.items():
        curve = train(kind, name, *flags)
        print(f"{kind} {name}: mean distance {distance(plain, curve):.4f}, last {plain[-1]:.4f} {curve[-1]:.4f}")
        assert 0 < distance(plain, curve) < 0.03
    saved = tmp_path / f"blockwise/iter_00000{STEPS}-hf"
    for file in saved.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert not [name for name in tensors.keys() if "float8" in str(tensors.get_tensor(name).dtype)]  # noqa: SIM118
    back = ["--mcore_model", str(tmp_path / "blockwise"), "--to_hf", "true", "--output_dir", str(tmp_path / "back")]
    assert main(["export", *back, "--verify", "bitwise"]) == 0


STATES = {
    "other states": ["--use_precision_aware_optimizer", "true"],
    "bf16 moments": ["--use_precision_aware_optimizer", "true", "--exp_avg_dtype", "bf16", "--exp_avg_sq_dtype", "bf16"],
    "fp16 main": ["--use_precision_aware_optimizer", "true", "--main_params_dtype", "fp16"],
    "bf16 gradients": ["--use_precision_aware_optimizer", "true", "--main_grads_dtype", "bf16"],
    "offloaded": ["--optimizer_cpu_offload", "true"],
    "half offloaded": ["--optimizer_cpu_offload", "true", "--optimizer_offload_fraction", "0.5"],
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_optimizer_states_of_other_kinds(name: str, train: Callable[..., Any], tmp_path: Path) -> None:
    """The curve of usual states, also when a run resumes from the others' checkpoint, in both directions."""
    plain, other = train("dense", "plain"), train("dense", "other", *STATES[name])
    print(f"{name}: mean distance {distance(plain, other):.5f}")
    assert distance(plain, other) < 0.01
    for before, flags in (("plain", STATES[name]), ("other", [])):
        after = tmp_path / f"{before}-resumed"
        shutil.copytree(tmp_path / before, after)
        shutil.rmtree(after / f"iter_00000{STEPS}")
        (after / "latest_checkpointed_iteration.txt").write_text(str(STEPS // 2))
        assert distance(plain, train("dense", after.name, *flags)) < 0.01


def test_activations_on_the_host(train: Callable[..., Any]) -> None:
    modules = ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"]
    flags = ["--fine_grained_activation_offloading", "true", "--offload_modules", *modules]
    assert distance(train("dense", "plain"), train("dense", "offloaded", *flags)) < 0.01
