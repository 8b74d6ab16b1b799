"""Each `next:` line that a command prints works as it stands, and what training was told of the template is known there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftlite.cli.main import main

TRAINED_WITH = ["--model_type", "qwen2_5", "--template", "qwen3", "--system", "Be brief."]
STEP = ["--train_iters", "1", "--global_batch_size", "1", "--report_to", "none"]


@pytest.fixture
def place(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a space in its name: `model` and `FILE.jsonl`, the data."""
    folder = tmp_path / "a place"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model("qwen2"), target_is_directory=True)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (folder / "FILE.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(folder)
    return folder


def follow(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command. Returns: the words of its `next:` line, [] if it is the last of its chain."""
    if words[0] == "infer":
        words = [*words, "--prompt", "hi", "--max_new_tokens", "1"]
    elif "sft" in words:
        words = [*words, *STEP]
    assert main(["FILE.jsonl" if word == "FILE" else word for word in words]) == 0, words
    said = capsys.readouterr().err
    if words[0] == "infer" and "--model" in words:
        assert "template 'qwen3'" in said and "system 'Be brief.'" in said
    found = re.findall(r"next: swiftlite (.*)", said)
    assert len(found) == (words[0] != "infer")
    return shlex.split(found[0]) if found else []


SFT = ["sft", "--model", "model", "--dataset", "FILE", *TRAINED_WITH]
MERGE = ["export", "--model", "model", "--merge_lora", "true"]


@pytest.mark.parametrize(
    "chain",
    [
        [[*SFT, "--output_dir", "run"]],
        [[*SFT, "--output_dir", "run", "--train_type", "lora"],
         [*MERGE, "--adapters", "run/checkpoint-1", "--output_dir", "merged"]],
        [["megatron", *SFT, "--output_dir", "run"]],
        [["megatron", *SFT, "--output_dir", "run", "--save_safetensors", "true"]],
        [["megatron", *SFT, "--output_dir", "run", "--train_type", "lora"],
         [*MERGE, "--adapters", "run/iter_0000001", "--output_dir", "merged"]],
        [["export", "--model", "model", "--to_mcore", "true", *TRAINED_WITH]],
        [["export", "--model", "model", "--to_cached_dataset", "true", "--dataset", "FILE", *TRAINED_WITH]],
    ],
    ids=["sft", "lora", "megatron", "megatron with -hf", "megatron lora", "to_mcore", "cached"],
)  # fmt: skip
def test_next_lines_work(chain: list[list[str]], place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in chain:
        ran = 0
        while words and ran < 4:
            words, ran = follow(words, capsys), ran + 1
        assert ran >= 2 and not words
