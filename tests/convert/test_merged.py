"""Merging adapters that hold more than pairs: the merged model answers as peft's, or the merge is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swiftlite.cli.export import export_main
from swiftlite.llm.infer import infer_main
from swiftlite.utils.errors import CheckpointError, ConfigError, SwiftliteError
from swiftlite.weights import lora

TinyModel = Callable[..., Path]


def adapter_of(base: Path, directory: Path, **config: Any) -> torch.Tensor:
    """Write an adapter whose every trained number is changed. Returns: the logits with it."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], **config))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    return logits(again)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None], use_cache=False).logits  # type: ignore[no-any-return]


def export(*words: object) -> Path:
    return export_main([str(word) for word in words])


@pytest.mark.parametrize(
    "config, tied",
    [
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["input_layernorm", "o_proj"]}, False),
        ({"bias": "all"}, False),
        ({"bias": "lora_only"}, False),
        ({"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [9]}}, False),
        ({"trainable_token_indices": [5, 9]}, True),
    ],
)
def test_merged_as_peft(config: dict[str, Any], tied: bool, tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2", tie_word_embeddings=tied)
    wanted = adapter_of(base, tmp_path / "adapter", **config)
    assert (wanted - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.05
    flags = ["--model", base, "--model_type", "qwen2_5", "--adapters", tmp_path / "adapter", "--merge_lora", "true"]
    export(*flags, "--output_dir", tmp_path / "merged", "--verify", "bitwise")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    export(*flags, "--to_mcore", "true", "--output_dir", tmp_path / "mcore")
    export("--mcore_model", tmp_path / "mcore", "--to_hf", "true", "--output_dir", tmp_path / "back")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), wanted, rtol=1e-5, atol=1e-5
    )
    export(*flags[:6], "--to_mcore", "true", "--output_dir", tmp_path / "pairs", "--verify", "bitwise")
    export(*flags[:4], "--mcore_adapter", tmp_path / "pairs", "--to_hf", "true", "--output_dir", tmp_path / "again")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert set(one) == set(two) and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changed the base weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
    ],
)
def test_refused_by_name(change: dict[str, Any], message: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """On every path that reads adapters."""
    base = tiny_model("qwen2")
    adapter_of(base, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    common = ["--model", str(base), "--model_type", "qwen2_5", "--adapters", str(tmp_path / "adapter")]
    for main, words in (
        (export_main, ["--merge_lora", "true"]),
        (export_main, ["--to_mcore", "true"]),
        (export_main, ["--to_mcore", "true", "--merge_lora", "true"]),
        (infer_main, ["--prompt", "hi", "--template", "qwen2_5"]),
    ):
        with pytest.raises(SwiftliteError, match=message):
            main([*common, *words, *(["--output_dir", str(tmp_path / "out")] if main is export_main else [])])


@pytest.mark.parametrize(
    "config, name, value",
    [
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight", float("nan")),
        ({"modules_to_save": ["input_layernorm"]}, "model.layers.1.input_layernorm.weight", float("-inf")),
        ({"bias": "all"}, "self_attn.k_proj.bias", float("inf")),
        ({"trainable_token_indices": [5, 9]}, "trainable_tokens_delta", float("nan")),
        ({}, "lora_A.weight", float("nan")),
    ],
)
def test_values_that_are_no_numbers(
    config: dict[str, Any],
    name: str,
    value: float,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whatever an adapter holds, also in its last row."""
    monkeypatch.setattr(lora, "_CHECKED_AT_ONCE", 100)
    base = tiny_model("qwen2")
    adapter_of(base, tmp_path / "adapter", **config)
    path = tmp_path / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    found = next(key for key in tensors if key.endswith(name))
    tensors[found].view(-1)[-1] = value
    save_file(tensors, path)
    for words in (["--merge_lora", "true"], ["--to_mcore", "true", "--merge_lora", "true"]):
        with pytest.raises(CheckpointError, match=f"{name.rpartition('.')[2]} in .*adapter has values that are NaN"):
            export("--model", base, "--model_type", "qwen2_5", "--adapters", tmp_path / "adapter", *words,
                   "--output_dir", tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_tied_model_trained_apart(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("qwen2", tie_word_embeddings=True)
    adapter_of(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(ConfigError, match="trained embedding and output layer apart"):
        export("--model", base, "--model_type", "qwen2_5", "--adapters", tmp_path / "adapter", "--merge_lora", "true",
               "--output_dir", tmp_path / "merged")  # fmt: skip
