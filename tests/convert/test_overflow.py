"""Finite values that become infinite in the dtype asked for: an error naming the tensors, on every way through a cast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.info import read_config
from swiftlite.cli.main import main
from swiftlite.llm.model.loader import get_model_tokenizer
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.hf_io import load_weights
from swiftlite.megatron.model.provider import build_models
from swiftlite.utils.errors import CheckpointError
from swiftlite.weights.storage import overflows

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
MESSAGE = f"{UP}, {DOWN}: finite values are infinite in float16, which ends at 65504"


@pytest.fixture
def large(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with a value beyond fp16 in two tensors, and an infinite one in a third, which was so before."""
    directory = tmp_path / "large"
    shutil.copytree(tiny_model("qwen3"), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors[UP][0, 0], tensors[DOWN][3, 2] = 1e5, -7e4
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def export(*words: str | Path) -> int:
    return main(["export", *map(str, words), "--model_type", "qwen3"])


def test_conversion_both_ways(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = ("--torch_dtype", "float16")
    assert export("--model", large, "--to_mcore", "true", *half, "--output_dir", tmp_path / "a") == 1
    assert MESSAGE in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert export("--model", large, "--to_mcore", "true", "--output_dir", tmp_path / "b") == 0
    assert export("--mcore_model", tmp_path / "b", "--to_hf", "true", *half, "--output_dir", tmp_path / "c") == 1
    assert MESSAGE in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".*.partial"))
    allowed = ("--allow_overflow", "true", *half)
    assert export("--mcore_model", tmp_path / "b", "--to_hf", "true", *allowed, "--output_dir", tmp_path / "c") == 0
    assert load_file(tmp_path / "c/model.safetensors")[UP].isinf().sum() == 1


def test_loading_into_live_models(large: Path) -> None:
    with pytest.raises(CheckpointError, match=UP):
        get_model_tokenizer(str(large), "float16", model_type="qwen3")
    get_model_tokenizer(str(large), "float16", model_type="qwen3", allow_overflow=True)
    args = MegatronArguments(torch_dtype="float16")
    args.apply_model_config(convert_hf_config(read_config(large)))
    with parallel_groups(args):
        models = [model.half() for model in build_models(args)]
        with pytest.raises(CheckpointError, match=UP):
            load_weights(models, large)
        load_weights(models, large, allow_overflow=True)


def test_merging(large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum is what is cast: base and adapter are both in range here."""
    tensors = load_file(large / "model.safetensors")
    tensors[UP][0, 0], tensors[DOWN][3, 2] = 6e4, 0
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 0
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    adapter, module = tmp_path / "adapter", "base_model.model." + UP.removesuffix(".weight")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["up_proj"]})
    )
    rows, columns = tensors[UP].shape
    save_file(
        {
            f"{module}.lora_A.weight": torch.full((1, columns), 100.0),
            f"{module}.lora_B.weight": torch.full((rows, 1), 100.0),
        },
        adapter / "adapter_model.safetensors",
    )
    words = ("--model", large, "--adapters", adapter, "--merge_lora", "true", "--torch_dtype", "float16")
    assert export(*words, "--output_dir", tmp_path / "merged") == 1
    assert f"{UP}: finite values are infinite in float16" in capsys.readouterr().err
    assert export(*words, "--allow_overflow", "true", "--output_dir", tmp_path / "merged") == 0


def test_only_what_was_finite_and_a_smaller_range_counts() -> None:
    values = torch.tensor([1.0, torch.inf, torch.nan])
    assert not overflows(values, values.half()) and not overflows(values.bfloat16(), values)
    assert overflows(torch.tensor([3.4e38]), torch.tensor([3.4e38]).bfloat16())
    assert overflows(torch.tensor([65520.0], dtype=torch.bfloat16) * 2, (torch.tensor([131040.0])).half())
