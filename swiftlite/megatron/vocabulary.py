"""`export --new_special_tokens`: a checkpoint seen with more vocabulary rows, the new ones being the mean of the old."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.safetensors import Located, SafetensorsSource
from swiftlite.weights.storage import Extent, Files, TensorSpec, byte_view, read_tensor

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
ROWS = 4096  # read at once while the mean is taken


class GrownSource(SafetensorsSource):
    """A model directory whose embedding and head have `rows` rows; MTP copies of them grow alike."""

    def __init__(self, directory: Path, rows: int, scratch: Path) -> None:
        """scratch: folder for the mean rows, a few kB a tensor; must live as long as this object is read."""
        super().__init__(directory)
        self._means: dict[str, tuple[int, Extent]] = {}
        old = self.tensors[VOCABULARY[0]].spec.shape[0]
        grown = [n for n in self.tensors if n in VOCABULARY or n.endswith((".embed_tokens.weight", ".head.weight"))]
        with Files() as files:
            for name in grown:
                located = self.tensors[name]
                path = scratch / f"{len(self._means)}.row"
                path.write_bytes(byte_view(self._mean(name, files)))
                self._means[name] = (located.spec.nbytes, Extent(path, 0, path.stat().st_size))
                spec = TensorSpec(located.spec.dtype, (rows, *located.spec.shape[1:]))
                self.tensors[name] = Located(spec, located.file, located.offset)
        assert rows > old

    def _mean(self, name: str, files: Files) -> torch.Tensor:
        spec = self.tensors[name].spec
        total = torch.zeros(spec.shape[1], dtype=torch.float64)
        for start in range(0, spec.shape[0], ROWS):
            block = read_tensor(self, name, files, rows=(start, min(start + ROWS, spec.shape[0])))
            total += block.double().sum(0)
        return (total / spec.shape[0]).to(spec.dtype)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        if name not in self._means:
            yield from super().extents(name, start, stop)
            return
        stored, row = self._means[name]
        if start < stored:
            yield from super().extents(name, start, min(stop, stored))
        position = max(start, stored)
        while position < stop:
            inside = (position - stored) % row.size
            size = min(row.size - inside, stop - position)
            yield Extent(row.file, inside, size)
            position += size


@dataclass(frozen=True)
class NewTokens:
    """The tokenizer with the new tokens, and the source and config that have room for them."""

    tokenizer: Any
    source: SafetensorsSource
    config: dict[str, Any]


def add_tokens(args: Any, model_dir: Path, config: Mapping[str, Any], scratch: Path) -> NewTokens | None:
    """Carry out --new_special_tokens; None if there are none. Rows are added only where the vocabulary has no room."""
    from swiftlite.llm.model.loader import load_tokenizer, read_special_tokens, resized_vocab_size

    tokens = read_special_tokens(args.new_special_tokens)
    if not tokens:
        return None
    tokenizer = load_tokenizer(str(model_dir), trust_remote_code=args.trust_remote_code)
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    old, new = config["vocab_size"], resized_vocab_size(config["vocab_size"], len(tokenizer))
    get_logger().info(
        "%d new tokens; vocabulary of %d rows%s", added, old, f" grows to {new}" if new > old else " has room"
    )
    if new > old and config.get("quantization_config"):
        raise UsageError(
            "--new_special_tokens: not with FP8 weights; convert without it, then add tokens to the result"
        )
    source = GrownSource(model_dir, new, scratch) if new > old else open_source(model_dir, config)
    return NewTokens(tokenizer, source, {**config, "vocab_size": new})
