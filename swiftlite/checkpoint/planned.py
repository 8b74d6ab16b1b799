"""The tensors that config.json and the index speak of, for planning where the weights themselves are not there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from swiftlite.checkpoint.bind import bind_map, is_bare, resolve_copy, whole_name
from swiftlite.families.hf_config import as_backbone
from swiftlite.utils.io import blame, read_json
from swiftlite.utils.types import Config
from swiftlite.weights.fp8 import ACTIVATION_SCALES, SCALES
from swiftlite.weights.packed import value_name
from swiftlite.weights.safetensors import INDEX, SINGLE, SafetensorsSource, StoredTensor
from swiftlite.weights.storage import TensorSpec


class PlannedSource(SafetensorsSource):
    """A model directory without its weights: nothing can be read."""

    def __init__(self, directory: Path, config: Config) -> None:
        """Without an index: all tensors that the config describes, MTP blocks too."""
        self.directory = directory
        names = self._index
        self.config = as_backbone(config) if self._bare else config
        bound = bind_map(self.config, names, with_mtp=not self._index)
        fused = [name for name in self._index if name in bound.fused]
        shapes = {name: bound.shape(name) for name in (*(fused if self._index else bound.stored_names), *bound.by_hf)}
        kept = {name for name in shapes if bound.rule(name).keep_dtype}
        for copy in bound.duplicates:
            if copy.name in self._index:
                shapes[copy.name] = shapes[resolve_copy(copy, bound)]
        dtype = getattr(torch, str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"))
        # Names that no rule knows are reported by BoundMap.check; scales of FP8 weights go when these are dequantised.
        unknown = {n: () for n in self._index if n not in shapes and not n.endswith((*SCALES, *ACTIVATION_SCALES))}
        self.tensors = {
            name: StoredTensor(TensorSpec(torch.float32 if name in kept else dtype, shape), self._file(name), 0)
            for name, shape in {**shapes, **unknown}.items()
            if name in (self._index or bound.stored_names)
        }

    @cached_property
    def _index(self) -> Mapping[str, str]:
        """Of the weights as they are read."""
        stored = {plain: file for name, file in super()._index.items() if (plain := value_name(name))}
        self._bare = is_bare(stored)
        return {whole_name(name): file for name, file in stored.items()} if self._bare else stored

    def _file(self, name: str) -> Path:
        return self.directory / self._index.get(name, SINGLE)

    @property
    def stored_bytes(self) -> int:
        """What the index says, or the sum of the tensors."""
        path = self.directory / INDEX
        with blame(path):
            stated = (read_json(path).get("metadata") or {}).get("total_size") if path.is_file() else None
            return int(stated or sum(stored.spec.nbytes for stored in self.tensors.values()))
