"""Which files are a model's, in every directory that is copied or pushed; what config.json says of the weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from swiftlite.checkpoint.files import copy_side_files, main_dtype, published_files, side_files

MODEL = ("config.json", "generation_config.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "LICENSE")
# What a run, or a user, puts next to them.
PRIVATE = (
    "args.json", "rejects.jsonl", "logging.jsonl", "loss.png", "best.json", "data_state.json", "trainer_state.json",
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "fp32_parameters.safetensors",
    "manifest.json", "hashes.json", "latest_checkpointed_iteration.txt", "megatron_lm_args.txt", "notes.txt",
    "train.jsonl", "all_results.json", "secret.py", "wandb.json", ".env",
)  # fmt: skip


def fill(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_text("{}")
    return directory


def test_only_the_models_files_are_copied_and_pushed(tmp_path: Path) -> None:
    source = fill(tmp_path / "run", *MODEL, *PRIVATE, "model.safetensors")
    (source / "runs").mkdir()
    assert [p.name for p in side_files(source)] == sorted(MODEL)
    assert {p.name for p in published_files(source)} == {*MODEL, "model.safetensors"}
    target = fill(tmp_path / "out")
    copy_side_files(source, target, {})
    assert sorted(p.name for p in target.iterdir()) == sorted(MODEL)


def test_code_goes_along_where_the_config_names_it(tmp_path: Path) -> None:
    source = fill(tmp_path, "config.json", "modeling_x.py")
    assert "modeling_x.py" not in [p.name for p in side_files(source)]
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_x.X"}}))
    assert "modeling_x.py" in [p.name for p in side_files(source)]


def test_weights_that_are_pushed_are_those_that_transformers_reads(tmp_path: Path) -> None:
    shards = {"model-00001-of-00002.safetensors", "special.safetensors", "model.safetensors.index.json"}
    source = fill(tmp_path, "config.json", "other.safetensors", "pytorch_model.bin", *shards)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "special.safetensors"}}))
    assert {p.name for p in published_files(source)} == {"config.json", *shards}
    fill(source, "model.safetensors")
    assert {p.name for p in published_files(source)} == {"config.json", "model.safetensors"}
    for name in (*shards, "model.safetensors"):
        (source / name).unlink()
    assert {p.name for p in published_files(source)} == {"config.json", "pytorch_model.bin"}
    adapter = fill(tmp_path / "lora", "adapter_config.json", "adapter_model.safetensors", "optimizer.pt")
    assert {p.name for p in published_files(adapter)} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_dtype_of_the_weights_stands_under_whichever_key_there_is(tmp_path: Path) -> None:
    for config, expected in (
        ({"a": 1}, {"a": 1, "torch_dtype": "float16"}),
        ({"dtype": "bfloat16", "a": 1}, {"dtype": "float16", "a": 1}),
        (
            {"torch_dtype": "float32", "dtype": "bfloat16", "text_config": {"dtype": "float32"}, "b": {"c": 1}},
            {"torch_dtype": "float16", "dtype": "float16", "text_config": {"dtype": "float16"}, "b": {"c": 1}},
        ),
    ):  # fmt: skip
        source, target = fill(tmp_path / "in"), fill(tmp_path / "out")
        (source / "config.json").write_text(json.dumps(config))
        copy_side_files(source, target, {}, torch.float16)
        written = json.loads((target / "config.json").read_text())
        assert written == expected and list(written) == list(expected)
        copy_side_files(target, source, {}, torch.float16)
        assert (source / "config.json").read_text() == (target / "config.json").read_text()
    (source / "config.json").write_text("{}")
    copy_side_files(source, target, {}, torch.float32)
    assert (target / "config.json").read_text() == "{}", "without a key it is fp32"
    assert main_dtype([(torch.float32, 2), (torch.bfloat16, 3), (torch.float32, 2)]) == torch.float32
