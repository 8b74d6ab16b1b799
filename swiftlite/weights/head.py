"""A head in the place of a checkpoint's own: new, for a language model that becomes a classifier, or an adapter's."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, Wrapped, byte_view

HEAD = "score.weight"


def initial_head(num_labels: int, hidden: int, std: float, seed: int) -> Tensor:
    """[num_labels, hidden] of a new score head, fp32, normal as transformers draws linear layers.

    It depends on seed and shape alone, so it is the same on both sides and under every parallel layout.
    """
    digest = hashlib.sha256(f"{seed} {HEAD}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(num_labels, hidden).normal_(0.0, std, generator=generator)


class Headed(Wrapped):
    """A source of plain tensors or of values that are made while they are read, with `values` as HEAD."""

    def __init__(self, base: WeightSource, values: Tensor) -> None:
        """The values are kept in a folder of their own, which lives as long as this."""
        super().__init__(base)
        self._spec = TensorSpec(values.dtype, tuple(values.shape))
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / HEAD
        self._file.write_bytes(byte_view(values.contiguous()))

    @property
    def names(self) -> Collection[str]:
        return {*self.base.names, HEAD}

    def spec(self, name: str) -> TensorSpec:
        return self._spec if name == HEAD else self.base.spec(name)

    def value_dtype(self, name: str) -> torch.dtype:
        return self._spec.dtype if name == HEAD else self.base.value_dtype(name)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        return iter([Extent(self._file, start, stop - start)]) if name == HEAD else self.base.extents(name, start, stop)

    def read(self, name: str, first: int, out: Tensor, files: Files) -> None:
        reader = WeightSource.read if name == HEAD else Wrapped.read
        reader(self, name, first, out, files)

    def scattered(self, name: str) -> bool:
        return name != HEAD and self.base.scattered(name)

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        return raw if name == HEAD else self.base.decode(name, row, column, raw)
