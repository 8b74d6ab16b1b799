"""Files beside a converted checkpoint: config.json, manifest, hashes. What is copied: see llm/model/files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftlite.checkpoint.info import check_config
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.io import blame, is_inside, plain_name, read_json, write_json
from swiftlite.weights.rule import Coverage
from swiftlite.weights.safetensors import DTYPES as SAFETENSORS_DTYPES

MANIFEST = "manifest.json"
DTYPES = {str(dtype).removeprefix("torch.") for dtype in SAFETENSORS_DTYPES.values()}
HASHES = "hashes.json"
MEGATRON_LM_ARGS = "megatron_lm_args.txt"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """manifest.json of a checkpoint that swiftlite converted, None for others."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    manifest = read_json(path)
    with blame(path):
        for name, tensor in manifest.get("tensors", {}).items():
            plain_name(tensor["file"], path, ".safetensors")
            if tensor["dtype"] not in DTYPES:
                raise ValueError(f"dtype {tensor['dtype']!r} of {name}")
    return manifest


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory. Raises: ConfigError if it is absent, CheckpointError if it is damaged."""
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing; give the model's own directory or id with --model")
    if not is_inside(path, directory):
        raise ConfigError(f"{path} is a link out of its directory; put the file itself there")
    config = read_json(path)
    check_config(config, path)
    return config


def write_manifest(directory: Path, source: Any, coverage: Coverage) -> None:
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
    return read_json(path) if path.is_file() else {}
