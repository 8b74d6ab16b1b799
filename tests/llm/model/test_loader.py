"""Loading of models and tokenizers: repairs, added tokens, errors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from swiftlite.llm.model.loader import (
    get_model_processor,
    get_model_tokenizer,
    load_tokenizer,
    read_special_tokens,
    repair_pad_eos,
    resized_vocab_size,
    resolve_function,
)
from swiftlite.utils.errors import CheckpointError, ConfigError, SwiftliteError, UsageError

TinyModel = Callable[..., Path]


def test_loads_model_and_tokenizer_with_their_facts(tiny_model: TinyModel) -> None:
    directory = str(tiny_model("glm4_moe"))
    model, tokenizer = get_model_tokenizer(directory)
    assert model is not None and model.dtype is torch.float32 and not model.training
    assert model.model_dir == directory
    assert model.model_info.model_type == tokenizer.model_info.model_type == "glm4_5"
    assert model.model_meta is tokenizer.model_meta
    half, _ = get_model_tokenizer(directory, torch.bfloat16, attn_impl="eager")
    assert half is not None and half.dtype is torch.bfloat16
    assert half.config._attn_implementation == "eager"
    nothing, tokenizer = get_model_processor(directory, load_model=False)
    assert nothing is None and tokenizer.eos_token_id == 2


@pytest.mark.parametrize(("missing", "present"), [("pad_token", "eos_token"), ("eos_token", "pad_token")])
def test_pad_and_eos_stand_in_for_each_other(tiny_tokenizer_dir: Path, missing: str, present: str) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    setattr(tokenizer, missing, None)
    repair_pad_eos(tokenizer)
    assert getattr(tokenizer, missing) == getattr(tokenizer, present)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id is not None


def test_neither_pad_nor_eos_is_an_error(tiny_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_tokenizer_dir))
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a pad nor an eos token"):
        repair_pad_eos(tokenizer)


def test_a_pad_id_that_differs_is_written_into_the_model(tiny_model: TinyModel) -> None:
    model, tokenizer = get_model_tokenizer(str(tiny_model("llama", pad_token_id=7)), need_template=False)
    assert model is not None and tokenizer.pad_token_id == 0
    assert model.config.pad_token_id == 0
    unset, _ = get_model_tokenizer(str(tiny_model("llama")), need_template=False)
    assert unset is not None and unset.config.pad_token_id is None  # nothing to contradict


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_get_the_mean_of_the_old_rows(tiny_model: TinyModel, tied: bool) -> None:
    directory = str(tiny_model("qwen2", vocab_size=310, tie_word_embeddings=tied))
    before, plain = get_model_tokenizer(directory, need_template=False)
    model, tokenizer = get_model_tokenizer(directory, need_template=False, new_special_tokens=["<|tool|>", "<|end|>"])
    assert before is not None and model is not None
    assert len(tokenizer) == len(plain) + 2
    assert tokenizer.convert_tokens_to_ids("<|tool|>") == len(plain)
    assert model.config.vocab_size == 384 and model.model_info.config["vocab_size"] == 384  # the next multiple of 128
    for matrix in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, matrix)().weight, getattr(model, matrix)().weight
        assert new.shape == (384, 64)
        assert torch.equal(new[:310], old)
        assert torch.allclose(new[310:], old.mean(dim=0).expand(74, -1), atol=1e-6)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is tied


def test_new_tokens_that_fit_change_no_shape(tiny_model: TinyModel) -> None:
    directory = str(tiny_model("qwen2", vocab_size=333))
    model, tokenizer = get_model_tokenizer(directory, need_template=False, new_special_tokens=["<|tool|>"])
    assert model is not None and len(tokenizer) == 311
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 333


def test_special_tokens_from_words_and_files(tmp_path: Path) -> None:
    file = tmp_path / "tokens.txt"
    file.write_text("<a>\n<b> <a>\n")
    assert read_special_tokens(["<c>", str(file)]) == ["<c>", "<a>", "<b>"]
    assert read_special_tokens(None) == []
    with pytest.raises(UsageError, match=r"absent.txt: no such file"):
        read_special_tokens(["absent.txt"])


@pytest.mark.parametrize(("vocab", "tokens", "rows"), [(320, 320, 320), (320, 321, 384), (151936, 151669, 151936)])
def test_resized_vocabulary(vocab: int, tokens: int, rows: int) -> None:
    assert resized_vocab_size(vocab, tokens) == rows


def test_errors_are_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--attn_impl slow is not known; allowed: eager"):
        get_model_tokenizer(str(tiny_model("glm4_moe")), attn_impl="slow")
    with pytest.raises(ConfigError, match="nowhere:nothing cannot be imported"):
        resolve_function("nowhere:nothing")

    directory = tmp_path / "model"
    shutil.copytree(tiny_model("glm4_moe"), directory)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="could not be loaded") as caught:
        get_model_tokenizer(str(directory))
    assert "\n" not in str(caught.value)
    for file in directory.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer could be loaded from") as caught:
        get_model_tokenizer(str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_side_file_is_named(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    shutil.copytree(tiny_model("qwen3"), tmp_path / "model")
    for text in ("{", "[" * 100_000, "[1]"):
        (tmp_path / "model" / name).write_text(text)
        with pytest.raises(CheckpointError, match=f"{name} (is not valid JSON|holds a list)"):
            load_tokenizer(str(tmp_path / "model"))


def test_a_model_that_runs_code_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    directory = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), directory)
    (directory / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="could not be loaded: refers to posix.mkdir, which is code") as caught:
        get_model_tokenizer(str(directory), model_type="qwen3")
    assert "weights_only" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantised_weights_are_refused(tmp_path: Path, method: str) -> None:
    (tmp_path / "config.json").write_text(
        f'{{"architectures": ["Glm4MoeForCausalLM"], "quantization_config": {{"quant_method": "{method}", "bits": 4}}}}'
    )
    with pytest.raises(SwiftliteError, match=f"{method.upper()} weights.*use the unquantised checkpoint"):
        get_model_tokenizer(str(tmp_path))
