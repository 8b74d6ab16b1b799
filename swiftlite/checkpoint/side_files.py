"""Files next to a converted checkpoint: config.json, manifest, hashes. What is copied: see files.py."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from swiftlite.utils.io import blame, plain_name, read_json, write_json, write_text_atomic
from swiftlite.utils.types import Json
from swiftlite.weights.safetensors import DTYPES as SAFETENSORS_DTYPES

MANIFEST = "manifest.json"
DTYPES = {str(dtype).removeprefix("torch.") for dtype in SAFETENSORS_DTYPES.values()}
HASHES = "hashes.json"
MEGATRON_LM_ARGS = "megatron_lm_args.txt"


def read_manifest(directory: Path) -> Json | None:
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


def write_hashes(directory: Path, hashes: Mapping[str, str]) -> None:
    """Record the xxh3_128 of every tensor, under its Hugging Face name, as this checkpoint holds it."""
    write_json(directory / HASHES, dict(sorted(hashes.items())))


def read_hashes(directory: Path) -> dict[str, str]:
    """The recorded hashes of a converted checkpoint, {} where there are none."""
    return read_json(directory / HASHES, optional=True)


def write_megatron_lm_args(directory: Path, words: Sequence[str] | str) -> None:
    """What stock Megatron-LM loads this checkpoint with, or the line that says why it cannot."""
    write_text_atomic(directory / MEGATRON_LM_ARGS, words if isinstance(words, str) else shlex.join(words) + "\n")
