"""Files around the weights: config.json, tokenizer, manifest. Nothing here is executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from swiftlite.utils.errors import ConfigError
from swiftlite.utils.io import write_json
from swiftlite.weights.rule import Coverage
from swiftlite.weights.safetensors import INDEX, SafetensorsSource
from swiftlite.weights.torch_dist import TRACKER

MANIFEST = "manifest.json"
HASHES = "hashes.json"
MEGATRON_LM_ARGS = "megatron_lm_args.txt"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp")
NOT_COPIED = {"args.json", MANIFEST, HASHES, INDEX, MEGATRON_LM_ARGS, TRACKER}


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """manifest.json of a checkpoint that swiftlite converted, None for others."""
    path = directory / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises: ConfigError if it is absent or no JSON object."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the model's own directory or id with --model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return config


def write_manifest(directory: Path, source: SafetensorsSource, coverage: Coverage) -> None:
    """Record names, order, dtypes, shapes and files of the source, so that the way back restores them."""
    tensors = {}
    for name, located in source.tensors.items():
        if name not in coverage.ignored:
            dtype = str(source.value_dtype(name)).removeprefix("torch.")
            tensors[name] = {"dtype": dtype, "shape": list(located.spec.shape), "file": located.file.name}
    write_json(directory / MANIFEST, {"ignored": list(coverage.ignored), "tensors": tensors})


def write_hashes(directory: Path, hashes: Mapping[str, str]) -> None:
    """Record the xxh3_128 of every tensor, under its Hugging Face name, as this checkpoint holds it."""
    write_json(directory / HASHES, dict(sorted(hashes.items())))


def read_hashes(directory: Path) -> dict[str, str]:
    """The recorded hashes of a converted checkpoint, {} where there are none."""
    path = directory / HASHES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def copy_side_files(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Copy config, tokenizer and code files, never executing any; change only the named keys of config.json.

    quantization_config goes: weights are written dequantised.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHT_SUFFIXES and path.name not in NOT_COPIED:
            if not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
    if "quantization_config" in read_config(target):
        changes = {**changes, "quantization_config": None}
    if changes:
        update_config(target / "config.json", changes)


def update_config(path: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of a config.json, None removes one; everything else keeps its text order."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
            key = "dtype" if "dtype" in config and "torch_dtype" not in config else "torch_dtype"
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    write_json(path, config)
