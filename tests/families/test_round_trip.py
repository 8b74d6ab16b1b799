"""Every model type: transformers writes a tiny model, it is converted there and back, and every byte is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.llm.model import reference

from .cases import build_hf, config_of, distinct_cases

reference.register()


def to_mcore(source: Path, target: Path, **options: Any) -> None:
    convert(Checkpoint.open(source), McoreTarget(**options), target, Options(quiet=True, exist_ok=True))


def to_hf(source: Path, target: Path, max_shard_bytes: int | None = None, manifest: bool = True) -> None:
    if not manifest:
        (source / "manifest.json").unlink(missing_ok=True)
    convert(Checkpoint.open(source), HfTarget(None, max_shard_bytes), target, Options(quiet=True))


@pytest.mark.parametrize("case", distinct_cases())
def test_there_and_back_is_bit_exact(case: str, tmp_path: Path) -> None:
    build_hf(config_of(case), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


ODD = {
    "qwen2_5:default": {"num_hidden_layers": 5, "vocab_size": 333, "num_attention_heads": 6, "hidden_size": 96},
    "llama3_1:default": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "vocab_size": 333},
    "qwen3:default": {"num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 7},
    "qwen3_moe:default": {"num_experts": 6, "num_experts_per_tok": 3, "vocab_size": 333, "num_hidden_layers": 5},
    "glm4_5:default": {
        "n_routed_experts": 6, "num_experts_per_tok": 3, "first_k_dense_replace": 2, "num_hidden_layers": 7,
        "vocab_size": 333, "num_attention_heads": 6, "num_key_value_heads": 3, "n_shared_experts": 2,
        "num_nextn_predict_layers": 2,
    },
    "deepseek_v2:default": {
        "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "q_lora_rank": 20, "vocab_size": 333,
    },
    "phi3:longrope": {"num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 80, "num_hidden_layers": 5},
    "gpt_oss:default": {"num_local_experts": 5, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 7},
    "llama4_text:default": {"num_local_experts": 3, "num_key_value_heads": 1, "moe_layers": [0, 3], "hidden_size": 48},
    "moonlight:default": {"n_routed_experts": 6, "num_experts_per_tok": 3, "first_k_dense_replace": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_odd_sizes_and_dtypes(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build_hf({**config_of(case), **ODD[case]}, tmp_path / "hf", dtype=dtype)
    to_mcore(tmp_path / "hf", tmp_path / "mcore", num_files=3)
    to_hf(tmp_path / "mcore", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (tmp_path / "hf/model.safetensors").read_bytes()


def test_without_a_manifest_the_tensors_are_still_the_same(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    build_hf(config_of("qwen3:tied"), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "back", max_shard_bytes=100_000, manifest=False)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    back: dict[str, torch.Tensor] = {}
    for file in set(index.values()):
        back |= load_file(tmp_path / "back" / file)
    original = load_file(tmp_path / "hf/model.safetensors")
    assert back.keys() == original.keys() == index.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("case", ["glm4_5:default", "qwen3_moe:default", "qwen3:default", "moonlight:default"])
def test_files_of_mixed_dtypes(case: str, tmp_path: Path) -> None:
    """Norms and router bias in fp32, the rest in bf16: every tensor keeps its own dtype and bytes."""
    from safetensors.torch import load_file, save_file

    build_hf(config_of(case), tmp_path / "hf", dtype=torch.bfloat16)
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    mixed = {n: t.float() if "norm" in n or "e_score" in n else t for n, t in tensors.items()}
    save_file(mixed, path, {"format": "pt"})
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    to_hf(tmp_path / "mcore", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == path.read_bytes()
    assert {t.dtype for t in mixed.values()} == {torch.float32, torch.bfloat16}
