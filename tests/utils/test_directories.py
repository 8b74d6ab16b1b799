"""What a directory is, and what a command says of one of the wrong kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from swiftlite.cli.main import main
from swiftlite.utils.directories import TRACKER, Directory, expect
from swiftlite.utils.errors import CheckpointError, UsageError


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One directory of each kind, of empty files; it is the working directory."""
    files = {
        "hf": ["config.json", "model.safetensors"],
        "peft": ["adapter_config.json", "adapter_model.safetensors"],
        "mcore": ["config.json", "args.json", TRACKER, "iter_0000010/.metadata", "iter_0000020/.metadata"],
        "ready": ["config.json", TRACKER, "iter_0000010/.metadata", "iter_0000010-hf/config.json"],
        "lora": ["adapter_config.json", TRACKER, "iter_0000010/.metadata", "iter_0000010/adapter_config.json",
                 "iter_0000010/adapter_model.safetensors"],
        "adapter": ["adapter_config.json", TRACKER, "iter_0000010/.metadata"],
        "run": [f"checkpoint-{n}/{file}" for n in (9, 10) for file in ("config.json", "model.safetensors")],
        "versions": ["v0-20260101-000000/checkpoint-5/config.json", "v0-20260101-000000/checkpoint-5/model.safetensors"],
        "cached": ["cached_dataset.json"],
        "config": ["config.json"],
        "nothing": ["notes.txt"],
    }  # fmt: skip
    for name, paths in files.items():
        for file in paths:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("10" if path.name == TRACKER else "")
    (tmp_path / "mcore" / TRACKER).write_text("20")
    (tmp_path / "data.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What each kind is told where a Hugging Face model is wanted; it names what to type instead.
TO_A_MODEL = {
    "peft": "is a LoRA adapter; give it with --adapters peft, and its base model with --model",
    "mcore": "the newest is iter_0000020; .*swiftlite export --mcore_model mcore/iter_0000020 --to_hf true",
    "mcore/iter_0000010": "swiftlite export --mcore_model mcore/iter_0000010 --to_hf true",
    "ready": "its Hugging Face form is there: give --model ready/iter_0000010-hf",
    "lora": "LoRA adapter of a Megatron run; give its newest checkpoint with --adapters lora/iter_0000010",
    "lora/iter_0000010": "give it with --adapters lora/iter_0000010, and its base model with --model",
    "adapter": "give it with --mcore_adapter adapter",
    "run": "is a training run, its newest checkpoint is checkpoint-10; give it with --model run/checkpoint-10",
    "versions": "its newest checkpoint is checkpoint-5; give it with --model versions/v0-20260101-000000/checkpoint-5",
    "cached": "is tokenised data; give it with --cached_dataset cached",
    "config": "has a config.json but no weights",
    "nothing": "holds neither a model nor a checkpoint",
}


@pytest.mark.parametrize("command", ["infer", "sft", "pt", "dpo", "megatron sft", "megatron dpo", "export"])
def test_a_directory_that_is_no_model(kinds: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    further = {"infer": [], "export": ["--to_mcore", "true"]}.get(command, ["--dataset", "data.jsonl"])
    for kind, message in TO_A_MODEL.items():
        assert main([*command.split(), "--model", kind, *further]) == 1, kind
        said = capsys.readouterr().err
        assert f"--model {kind}: " in said and said.count("\n") == 1
        with pytest.raises(CheckpointError, match=message):
            expect("model", kind, "is_hf")


@pytest.mark.parametrize("command", ["megatron sft", "megatron pt", "megatron dpo", "export"])
@pytest.mark.parametrize(
    "kind, message",
    [
        ("hf", "is a Hugging Face directory; give it with --model hf"),
        ("peft", "is a LoRA adapter"),
        ("lora", "is a LoRA adapter of a Megatron run"),
        ("adapter", "give it with --mcore_adapter adapter"),
        ("run", "give it with --model run/checkpoint-10"),
        ("nothing", "holds neither"),
    ],
)
def test_a_directory_that_is_no_megatron_checkpoint(
    kinds: Path, command: str, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    further = ["--to_hf", "true"] if command == "export" else ["--dataset", "data.jsonl"]
    assert main([*command.split(), "--mcore_model", kind, *further]) == 1
    said = capsys.readouterr().err
    assert f"--mcore_model {kind}: " in said and message in said


@pytest.mark.parametrize("kind", ["hf", "mcore", "run", "nothing"])
def test_a_directory_that_is_no_adapter(kinds: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["infer"], ["sft", "--train_type", "lora", "--dataset", "data.jsonl"],
                  ["export", "--merge_lora", "true"],
                  ["megatron", "sft", "--train_type", "lora", "--dataset", "data.jsonl"]):  # fmt: skip
        assert main([*words, "--model", "hf", "--adapters", kind]) == 1
        assert f"--adapters {kind}: " in capsys.readouterr().err


def test_other_commands_and_flags(kinds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo = ["dpo", "--model", "hf", "--dataset", "data.jsonl"]
    for words in (["verify", "hf", "peft"], ["verify", "run", "hf"], ["check", "--model", "run"],
                  ["preview", "--model", "peft", "--dataset", "data.jsonl"], [*dpo, "--ref_model", "mcore"],
                  ["megatron", *dpo, "--ref_model", "peft"]):  # fmt: skip
        assert main(words) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["infer", "--model", "data.jsonl"]) == 2
    assert main(["infer", "--model", "hf", "--adapters", "absent"]) == 2
    assert main(["infer", "--model", "absent"]) == 2


def test_the_named_iteration(kinds: Path) -> None:
    assert Directory(kinds / "mcore").iteration == kinds / "mcore/iter_0000020"
    assert Directory(kinds / "mcore/iter_0000010").iteration == kinds / "mcore/iter_0000010"
    assert expect("mcore_model", "mcore/iter_0000010", "is_megatron") == Path("mcore/iter_0000010")
    (kinds / "mcore" / TRACKER).unlink()
    assert Directory(kinds / "mcore").iteration == kinds / "mcore/iter_0000020"
    with pytest.raises(UsageError, match="is a file; give its directory"):
        expect("adapters", "data.jsonl", "is_peft")
