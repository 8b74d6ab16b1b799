"""LoRA adapters derived from a bound map: one pair A [r, in], B [out, r] per Hugging Face weight, fused or not.

Names are Hugging Face's on both sides: `model.layers.0.self_attn.q_proj.lora_A.weight`. A Megatron adapter checkpoint is a
torch_dist checkpoint with these names as keys. Adapters that other Megatron tools wrote (one shared A under a fused
linear) are read too: A is repeated, B is divided by the base weight's own row gather.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.weights.ops import Shape
from swiftlite.weights.rule import BoundMap, Entry, clip
from swiftlite.weights.storage import Extent, Files, TensorSource, TensorSpec, read_tensor
from swiftlite.weights.torch_dist import TorchDistSource, candidates

PEFT_PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"
# What `all-linear` means, on both sides: every projection, neither routers nor the output layer.
ALL_LINEAR = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
FOREIGN = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides what an adapter adds."""

    rank: int
    alpha: float
    use_rslora: bool = False
    alpha_pattern: Mapping[str, float] | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LoraConfig:
        """Raises: ConfigError for kinds of adapters that are not plain LoRA."""
        for key, plain in (("use_dora", False), ("fan_in_fan_out", False), ("bias", "none"), ("modules_to_save", None)):
            if config.get(key, plain) not in (plain, None, []):
                raise ConfigError(f"adapter_config.json: {key} {config[key]!r} is not supported, only plain LoRA is")
        if config.get("peft_type", "LORA") != "LORA":
            raise ConfigError(f"adapter_config.json: peft_type {config['peft_type']!r} is not supported, only LORA is")
        alpha = config.get("lora_alpha", config["r"])
        return cls(config["r"], alpha, bool(config.get("use_rslora")), config.get("alpha_pattern") or None)

    def scale(self, module: str, rank: int) -> float:
        """Factor on B A for one module; its rank is A's, whatever rank_pattern says."""
        alpha = self.alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def check_adapter(bound: BoundMap, shapes: Mapping[str, Shape], where: str) -> None:
    """Hold adapter names (without PEFT's prefix) and shapes against the base model.

    Raises: MapError for an unknown or incomplete module, ShapeError for a matrix that does not fit.
    """
    for name, shape in shapes.items():
        module = name.removesuffix(A).removesuffix(B)
        weight = f"{module}.weight"
        if module == name or weight not in bound.by_hf:
            raise MapError(f"{name} in {where} belongs to no weight of this model; is it the adapter's base model?")
        for suffix in (A, B):
            if module + suffix not in shapes:
                raise MapError(f"{module}{suffix} is missing in {where}")
        entry, position = bound.by_hf[weight]
        out, into = entry.hf_shapes[position]
        rank = shapes[module + A][0]
        wanted = (rank, into) if name.endswith(A) else (out, rank)
        if tuple(shape) != wanted:
            raise ShapeError(f"{name} in {where} has shape {list(shape)}, the base model needs {list(wanted)}")


class Merged:
    """A base checkpoint with an adapter added: W + scale B A, in fp32, row block by row block; a TensorSource.

    Wraps any source of base weights under Hugging Face names; `decode` does the work while weights are read.
    """

    def __init__(self, base: Any, adapter: TensorSource, names: Mapping[str, str], config: LoraConfig) -> None:
        """names: adapter name -> name in `adapter`."""
        self.base, self.adapter, self.names, self.config = base, adapter, names, config
        self._pair = lru_cache(maxsize=8)(self._read_pair)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def spec(self, name: str) -> TensorSpec:
        return self.base.spec(name)  # type: ignore[no-any-return]

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        return self.base.extents(name, start, stop)  # type: ignore[no-any-return]

    def _read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        with Files() as files:
            a, b = (read_tensor(self.adapter, self.names[module + suffix], files).float() for suffix in (A, B))
        return a, b * self.config.scale(module, a.shape[0])

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        decode = getattr(self.base, "decode", None)
        values: Tensor = raw if decode is None else decode(name, row, column, raw)
        module = name.removesuffix(".weight")
        if module + A not in self.names:
            return values
        a, b = self._pair(module)
        rows, columns = slice(row, row + raw.shape[0]), slice(column, column + raw.shape[1])
        return torch.addmm(values.float(), b[rows], a[:, columns])


class ForeignAdapter:
    """An adapter checkpoint under Megatron names, seen under Hugging Face's; a TensorSource.

    `names`: adapter name -> itself, for every module that the checkpoint has.
    """

    def __init__(self, source: TorchDistSource, bound: BoundMap) -> None:
        """Raises: MapError for a key that is no adapter of this model."""
        self.source = source
        parts: dict[str, dict[str, str]] = {}
        for key in source.tensors:
            match = FOREIGN.fullmatch(key)
            if match is None:
                raise MapError(f"{key} in {source.directory} is no LoRA tensor")
            parts.setdefault(f"{match[1]}.weight", {})[match[2]] = key
        self._found: dict[str, tuple[Entry, int, str, tuple[int, ...], tuple[int, ...]]] = {}
        used = set()
        for entry in bound.entries:
            slot = next((s for s in candidates(entry) if s.key in parts), None)
            if slot is None:
                continue
            used.add(slot.key)
            for position, weight in enumerate(entry.hf):
                for part, suffix in (("A", A), ("B", B)):
                    place = (entry, position, parts[slot.key][part], slot.index, slot.lead)
                    self._found[weight.removesuffix(".weight") + suffix] = place
        unknown = sorted(set(parts) - used)
        if unknown:
            raise MapError(f"{unknown[0]} in {source.directory} belongs to no weight of this model")
        self.names = {name: name for name in self._found}

    def spec(self, name: str) -> TensorSpec:
        entry, position, key, _, lead = self._found[name]
        stored = self.source.spec(key)
        shape = stored.shape[len(lead) :]
        if name.endswith(B):
            shape = (entry.hf_shapes[position][0], shape[-1])
        return TensorSpec(stored.dtype, shape)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        entry, position, key, index, lead = self._found[name]
        stored = self.source.spec(key)
        shape, flat = stored.shape[len(lead) :], 0
        for value, size in zip(index, lead, strict=True):
            flat = flat * size + value
        base = flat * math.prod(shape) * stored.dtype.itemsize
        if name.endswith(A):
            yield from self.source.extents(key, base + start, base + stop)
            return
        width = shape[-1] * stored.dtype.itemsize  # of one row of B
        assert start % width == 0 and stop % width == 0
        for segment in clip(entry.inverse(position), start // width, stop // width):
            first = base + segment.start * width
            yield from self.source.extents(key, first, first + segment.size * width)
