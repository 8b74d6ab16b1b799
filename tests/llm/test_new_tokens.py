"""--new_special_tokens on every path: tokenizer files in their source's form, rows that grow, adapters that carry them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from swiftlite.checkpoint.new_tokens import enter_tokens
from swiftlite.cli.export import export_main
from swiftlite.llm.infer import infer_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.sft import megatron_sft_main

TinyModel = Callable[..., Path]
NEW = ["<|audio_0|>", "<|audio_1|>"]
FORM = {
    "added_tokens_decoder": {}, "additional_special_tokens": ["<|im_start|>"], "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 256,
}  # fmt: skip


@pytest.fixture
def train(tiny_model: TinyModel, tmp_path: Path) -> Callable[..., Path]:
    """train(main, output, vocab_size, flag=value...) for one step -> the base model's directory."""
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": f"sound {NEW[0]}"}, {"role": "assistant", "content": NEW[1]}]}
    data.write_text(f"{json.dumps(row)}\n" * 4)

    def start(main: Any, output: str, vocab_size: int, **flags: Any) -> Path:
        base = tmp_path / f"base-{vocab_size}"
        if not base.exists():
            base.mkdir()
            for file in tiny_model("qwen2", vocab_size=vocab_size).iterdir():
                (base / file.name).write_bytes(file.read_bytes())
            (base / "tokenizer_config.json").write_text(json.dumps(FORM, indent=1))
        settings = {
            "model": base, "model_type": "qwen2_5", "template": "qwen2_5", "dataset": data, "train_iters": 1,
            "output_dir": tmp_path / output, "torch_dtype": "float32", "global_batch_size": 2, "max_length": 200,
            "report_to": "none", **flags,
        }  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        main([*words, "--new_special_tokens", *NEW])
        return base

    return start


def check_tokenizer(directory: Path, first: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert [tokenizer.encode(token, add_special_tokens=False) for token in NEW] == [[first], [first + 1]]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("added_tokens_decoder", "additional_special_tokens")} == {
        k: v for k, v in FORM.items() if k not in ("added_tokens_decoder", "additional_special_tokens")
    }
    assert config["additional_special_tokens"] == ["<|im_start|>", *NEW]
    assert [config["added_tokens_decoder"][str(first + i)]["content"] for i in range(2)] == NEW


def rows(directory: Path) -> int:
    weights = load_file(directory / "model.safetensors")
    sizes = {len(weights[name]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    assert sizes == {json.loads((directory / "config.json").read_text())["vocab_size"]}
    return sizes.pop()


@pytest.mark.parametrize("room", [True, False])
def test_full_training(room: bool, train: Any, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    taken = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    size = taken + 2 if room else taken
    train(sft_main, "hf", size)
    train(megatron_sft_main, "mcore", size, save_safetensors="true")
    export_main(["--mcore_model", str(tmp_path / "mcore"), "--to_hf", "true", "--output_dir", str(tmp_path / "back")])
    for directory in (tmp_path / "hf/checkpoint-1", tmp_path / "mcore/iter_0000001-hf", tmp_path / "back"):
        check_tokenizer(directory, taken)
        assert rows(directory) == (size if room else 384)
    trained = [load_file(tmp_path / d / "model.safetensors") for d in ("hf/checkpoint-1", "back")]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-4, atol=1e-6)


def test_adapters_carry_their_rows(train: Any, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Of either side; they are used and merged without naming the tokens again."""
    taken = len(AutoTokenizer.from_pretrained(tiny_tokenizer_dir))
    base = train(sft_main, "hf", taken, train_type="lora")
    train(megatron_sft_main, "mcore", taken, train_type="lora")
    for adapter in (tmp_path / "hf/checkpoint-1", tmp_path / "mcore/iter_0000001"):
        words = ["--model", str(base), "--model_type", "qwen2_5", "--adapters", str(adapter)]
        infer_main([*words, "--template", "qwen2_5", "--prompt", f"hi {NEW[0]}", "--max_new_tokens", "2"])
        merged = adapter.with_name("merged")
        export_main([*words, "--merge_lora", "true", "--output_dir", str(merged)])
        check_tokenizer(merged, taken)
        check_tokenizer(adapter, taken)
        for directory in (adapter, merged):
            assert "im_start" in (directory / "chat_template.jinja").read_text(), "the chat that was trained"
        assert rows(merged) == 384
        weights = load_file(adapter / "adapter_model.safetensors")
        carried = weights["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
        embedding = load_file(merged / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(embedding[taken : taken + 2], carried)
        mean = load_file(base / "model.safetensors")["model.embed_tokens.weight"].mean(0)
        torch.testing.assert_close(embedding[taken + 2], mean, rtol=1e-5, atol=1e-6)


def test_files_keep_their_form(tmp_path: Path) -> None:
    """Slow tokenizers have no tokenizer.json; lists hold texts or entries; what is known already is not entered twice."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {}}')
    (tmp_path / "added_tokens.json").write_text('{\n    "<a>": 7\n}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": [{"content": "<a>"}]}')
    for _ in range(2):
        enter_tokens(tmp_path, {"<a>": 7, "<b>": 8})
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert list(config) == ["tokenizer_class", "extra_special_tokens", "added_tokens_decoder"]
    assert config["extra_special_tokens"] == {} and list(config["added_tokens_decoder"]) == ["7", "8"]
    assert (tmp_path / "added_tokens.json").read_text() == '{\n    "<a>": 7,\n    "<b>": 8\n}\n'
    named = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert named == {"additional_special_tokens": [{"content": "<a>"}, "<b>"]}
