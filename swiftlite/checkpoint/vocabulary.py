"""`--new_special_tokens`: a checkpoint seen with more vocabulary rows, the new ones being the mean of the old."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftlite.checkpoint.info import first_of, with_changes
from swiftlite.families.hf_config import text_config
from swiftlite.utils.types import Config, Json
from swiftlite.weights.rule import text_name
from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, Wrapped, byte_view, read_tensor

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_ENDS = (".embed_tokens.weight", ".word_embeddings.weight", ".head.weight")
ROWS = 4096  # read at once while the mean is taken


class GrownSource(Wrapped):
    """A checkpoint under Hugging Face names whose embedding and head have `rows` rows; MTP copies of them grow alike."""

    def __init__(self, base: WeightSource, names: Iterable[str], rows: int) -> None:
        """names: tensors of `base`. Means are kept in a folder of their own, a few kB a tensor."""
        super().__init__(base)
        self.rows = rows
        self._means: dict[str, tuple[int, Extent]] = {}
        self._folder = tempfile.TemporaryDirectory()
        grown = [n for n in names if text_name(n) in VOCABULARY or n.endswith(_ENDS)]
        with Files() as files:
            for name in grown:
                path = Path(self._folder.name) / f"{len(self._means)}.row"
                path.write_bytes(byte_view(self._mean(name, files)))
                self._means[name] = (base.spec(name).nbytes, Extent(path, 0, path.stat().st_size))

    def spec(self, name: str) -> TensorSpec:
        spec = self.base.spec(name)
        return TensorSpec(spec.dtype, (self.rows, *spec.shape[1:])) if name in self._means else spec

    def _mean(self, name: str, files: Files) -> torch.Tensor:
        spec = self.base.spec(name)
        total = torch.zeros(spec.shape[1], dtype=torch.float64)
        for start in range(0, spec.shape[0], ROWS):
            block = read_tensor(self.base, name, files, rows=(start, min(start + ROWS, spec.shape[0])))
            total += block.double().sum(0)
        return (total / spec.shape[0]).to(spec.dtype)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        if name not in self._means:
            yield from self.base.extents(name, start, stop)
            return
        stored, row = self._means[name]
        if start < stored:
            yield from self.base.extents(name, start, min(stop, stored))
        position = max(start, stored)
        while position < stop:
            inside = (position - stored) % row.size
            size = min(row.size - inside, stop - position)
            yield Extent(row.file, inside, size)
            position += size

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        reader = WeightSource.read if name in self._means else Wrapped.read
        reader(self, name, first, out, files)


@dataclass(frozen=True)
class NewTokens:
    """What --new_special_tokens come to: the id of each token, the rows that the vocabulary has with them, and the ids of
    those that the tokenizer did not know."""

    ids: Mapping[str, int]
    rows: int
    added: Sequence[int]


def grown(config: Config, new_tokens: NewTokens | None) -> Json:
    """config.json of the model with the rows that new tokens need."""
    return with_changes(config, {"vocab_size": new_tokens.rows} if new_tokens is not None else {})


def rows_of(config: Config) -> Any:
    """Rows of the vocabulary, as config.json says; None where it does not."""
    return first_of(text_config(config), "vocab_size")
