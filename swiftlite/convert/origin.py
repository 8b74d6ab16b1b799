"""A checkpoint of either format as tensors under Hugging Face names. Opening one reads headers only; no megatron-core."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.files import copy_side_files
from swiftlite.checkpoint.new_tokens import enter_tokens
from swiftlite.checkpoint.side_files import read_config, read_manifest
from swiftlite.convert.plan import resolve_copy
from swiftlite.convert.vocabulary import GrownSource, NewTokens
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.storage import TensorSource
from swiftlite.weights.torch_dist import HfNames, McoreView, find_iteration


class Origin:
    """The checkpoint that a run starts from, of either format, as tensors under Hugging Face names.

    names: all tensors, in the order of the Hugging Face checkpoint. copies: tensors that are stored a second time under
    another name -> the tensor they repeat. dtypes: as stored there.
    """

    def __init__(self, directory: str | Path, new_tokens: NewTokens | None = None) -> None:
        """new_tokens: with the vocabulary rows that they need. Raises: CheckpointError, MapError, ShapeError if files and
        config.json do not match."""
        directory = Path(directory)
        self.root, self.new_tokens, config = origin_root(directory), new_tokens, read_config(origin_root(directory))
        self.source: TensorSource
        self.names: Sequence[str]
        if any(directory.glob("*.safetensors")):
            files = open_source(directory, config)
            self.bound = bind_map(config, files.tensors)
            self.bound.check({name: t.spec.shape for name, t in files.tensors.items()}, str(directory))
            self.source, stored = files, {name: files.value_dtype(name) for name in files.tensors}
        else:
            iteration = find_iteration(directory)
            dist = TorchDistSource(iteration)
            self.bound = bind_map(config, dist.tensors)
            self.source = HfNames(McoreView.open(dist, self.bound))
            manifest = (read_manifest(iteration.parent) or {}).get("tensors", {})
            stored = {name: getattr(torch, tensor["dtype"]) for name, tensor in manifest.items()}
        self.changes: dict[str, Any] = {}
        if new_tokens is not None and new_tokens.rows > config["vocab_size"]:
            self._scratch = tempfile.TemporaryDirectory()
            names = [*self.bound.by_hf, *(d.name for d in self.bound.duplicates if d.name in stored)]
            self.source = GrownSource(self.source, names, new_tokens.rows, Path(self._scratch.name))
            self.changes = {"vocab_size": new_tokens.rows}
            self.bound = bind_map({**config, **self.changes}, names)
        self.copies = {d.name: resolve_copy(d, self.bound) for d in self.bound.duplicates if d.name in stored}
        self.names = [n for n in stored if n in self.bound.by_hf or n in self.copies]
        if not set(self.names) >= set(self.bound.by_hf):
            self.names = [*self.bound.by_hf, *self.copies]
        self.dtypes = {n: stored[n] if n in stored else self.source.spec(n).dtype for n in self.names}

    def value_dtype(self, name: str) -> torch.dtype:
        """dtype in which a tensor is read from this checkpoint."""
        if hasattr(self.source, "value_dtype"):
            return self.source.value_dtype(name)  # type: ignore[no-any-return]
        return self.source.spec(name).dtype

    def write_side_files(self, target: Path, dtype: torch.dtype | None = None) -> None:
        """config.json, tokenizer and what else lies beside the weights, with the new tokens. dtype: of the weights."""
        copy_side_files(self.root, target, self.changes, dtype)
        if self.new_tokens is not None:
            enter_tokens(target, self.new_tokens.ids)


def as_origin(origin: str | Path | Origin) -> Origin:
    return origin if isinstance(origin, Origin) else Origin(origin)


def origin_root(directory: str | Path) -> Path:
    """Where config.json and the tokenizer of a checkpoint lie."""
    directory = Path(directory)
    return directory if (directory / "config.json").is_file() else find_iteration(directory).parent
