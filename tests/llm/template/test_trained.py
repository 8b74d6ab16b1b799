"""The checkpoint of a base model that was taught to chat: its template writes what was trained, its answers end there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from swiftlite.checkpoint.chat import copy_chat
from swiftlite.llm.template import get_template
from swiftlite.llm.template.trained import trained_chat

ROUNDS = [
    {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4 {{ x }}"},
    {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."},
]  # fmt: skip


@pytest.fixture
def base(tiny_tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer_dir)
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "chatml", "llama3", "glm4_5", "deepseek", "llama", "yi"])
def test_it_writes_what_was_trained(name: str, base: Any) -> None:
    template = get_template(name, base)
    chat = trained_chat(template)
    assert chat is not None and chat.jinja is not None
    for system in ([], [{"role": "system", "content": "Be kind."}]):
        for messages, generation in ((ROUNDS, False), (ROUNDS[:1], True), (ROUNDS[:3], True)):
            written = base.apply_chat_template(
                [*system, *messages], chat_template=chat.jinja, add_generation_prompt=generation, tokenize=False
            )
            wanted = template.render([*system, *messages], add_generation_prompt=generation)
            assert written in (wanted, template.training_text({"messages": [*system, *messages]})[0])


def test_files_of_the_checkpoint_and_of_what_is_merged(base: Any, tmp_path: Path) -> None:
    chat = trained_chat(get_template("qwen2_5", base))
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert chat is not None and chat.end == end
    model, adapter, merged = (tmp_path / name for name in ("model", "adapter", "merged"))
    for directory in (model, adapter, merged):
        directory.mkdir()
    for directory in (model, merged):
        (directory / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": 1, "hidden_size": 8}))
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old", "eos_token": "x"}))
    chat.write(adapter, model)
    chat.write(model)
    assert json.loads((model / "generation_config.json").read_text()) == {"eos_token_id": [end, 5], "bos_token_id": 1}
    stated = {"chat_template": chat.jinja, "eos_token": "x"}  # where the model had the old one: no file is added
    assert json.loads((model / "tokenizer_config.json").read_text()) == stated
    assert not (model / "chat_template.jinja").exists() and (adapter / "chat_template.jinja").read_text() == chat.jinja
    before = (model / "generation_config.json").read_text()
    chat.write(model)
    assert (model / "generation_config.json").read_text() == before, "nothing is added twice"
    copy_chat(adapter, merged)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (merged / name).read_text() == (model / name).read_text()


def test_a_model_that_chats_already_keeps_its_template(base: Any, tmp_path: Path) -> None:
    own = trained_chat(get_template("qwen2_5", base, template_backend="auto"))
    assert own is not None
    base.chat_template = own.jinja
    again = trained_chat(get_template("qwen2_5", base, template_backend="auto"))
    assert again is not None and again.jinja is None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [own.end], "top_p": 0.5}))
    again.write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["generation_config.json"]
    assert trained_chat(get_template("qwen2_5", base, use_chat_template=False)) is None


@pytest.mark.parametrize("jinja", ["{{ 'a' * 10**10 }}", "{% set x = 10**10**8 %}"])
def test_a_template_beyond_bounds_is_replaced(jinja: str, base: Any) -> None:
    """Jinja computes such expressions as it compiles the template, which is done within bounds, too."""
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = jinja
    chat = trained_chat(get_template("qwen2_5", tokenizer))
    assert chat is not None and chat.jinja is not None and "<|im_start|>" in chat.jinja
