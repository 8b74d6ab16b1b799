"""Quantised checkpoints, and of them FP8: weights with scales next to them, dequantised while they are read.

A scale, `weight_scale_inv` (DeepSeek-V3, Qwen3-FP8) or `weight_scale` (compressed-tensors, GLM-4.5-FP8), stands for a
block of rows and columns, for a row or for the whole tensor; its shape says which. It is a float or, as E8M0, a power of
two. The value of a weight is its FP8 number times its scale, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.utils.io import blame
from swiftlite.utils.types import Config
from swiftlite.weights.packed import PackedSource, from_stored
from swiftlite.weights.safetensors import PlainTensors, SafetensorsSource, StoredTensor
from swiftlite.weights.storage import Files, WeightSource, read_tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".weight_scale_inv", ".weight_scale")
# Scales of activations and of the key/value cache: no part of the weights.
ACTIVATION_SCALES = (".input_scale", ".output_scale", ".activation_scale", ".q_scale", ".k_scale", ".v_scale")
BLOCK = (128, 128)  # where config.json does not say
# Numbers looked up at a time: numpy makes indices of 8 bytes of them, which fit the cache of a processor core.
LOOKED_UP = 1 << 16


def open_source(directory: Path, config: Config) -> SafetensorsSource:
    """The tensors of a model directory, quantised ones decoded. Raises: ConfigError naming what is not read."""
    config = {**(config.get("text_config") or {}), **config}  # Kimi-K2.5 speaks of its text part alone
    quantisation = config.get("quantization_config")
    if not quantisation:
        plain = SafetensorsSource(directory)
        if not any(stored.spec.dtype in FP8 for stored in plain.tensors.values()):
            return plain
        quantisation = {"quant_method": "fp8"}
    method = str(quantisation.get("quant_method"))
    form = str(quantisation.get("format", "float-quantized"))
    is_fp8 = method in ("fp8", "fbgemm_fp8") or (method, form) == ("compressed-tensors", "float-quantized")
    if not is_fp8 and method != "mxfp4" and (method, form) != ("compressed-tensors", "pack-quantized"):
        raise ConfigError(
            f"the weights are quantised with {method}{f' ({form})' if method == 'compressed-tensors' else ''}; of quantised "
            "weights only FP8, MXFP4 and INT4 of compressed-tensors can be read (not AWQ, GPTQ, AQLM, bitsandbytes): use "
            "the unquantised model"
        )
    with blame(directory / "config.json"):
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        block, dequantised = block_of(quantisation), getattr(torch, dtype)
        if min(block) < 1 or not isinstance(dequantised, torch.dtype):
            raise ValueError(f"blocks of {block}, dtype {dtype}")
        if not is_fp8:
            return PackedSource(directory, dequantised, quantisation)
    return Fp8Source(directory, quantisation, dequantised)


def scales_of(directory: Path, config: Config) -> Scales | None:
    """Of the FP8 model in a directory, if there is one."""
    described = any(part.get("quantization_config") for part in (config, config.get("text_config") or {}))
    source = open_source(directory, config) if described and any(directory.glob("*.safetensors")) else None
    return source.kept() if isinstance(source, Fp8Source) else None


def block_of(quantisation: Config) -> tuple[int, int]:
    """Rows and columns that share a scale; either tool's way to write it."""
    groups = (quantisation.get("config_groups") or {}).values()
    written = [(group.get("weights") or {}).get("block_structure") for group in groups]
    block = next(filter(None, (quantisation.get("weight_block_size"), *written)), BLOCK)
    rows, columns = block.split("x") if isinstance(block, str) else block
    return int(rows), int(columns)


@cache
def _table(dtype: torch.dtype) -> NDArray[np.float32]:
    """fp32 of each byte."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()


def numbers_of(raw: Tensor) -> Tensor:
    """fp32 of FP8 numbers. Looked up: on a processor core, torch's own conversion takes some four times as long."""
    numbers = torch.empty(raw.shape)
    codes, out = raw.contiguous().view(torch.uint8).view(-1).numpy(), numbers.view(-1).numpy()
    table = _table(raw.dtype)
    for first in range(0, len(codes), LOOKED_UP):
        part = slice(first, first + LOOKED_UP)
        np.take(table, codes[part], out=out[part], mode="clip")  # without the check that a byte is below 256
    return numbers


def as_stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    return scales.to(torch.float8_e8m0fnu).view(torch.uint8) if dtype == torch.uint8 else scales.to(dtype)


@dataclass(frozen=True)
class Scales:
    """The scales of an FP8 checkpoint. source: they, as they are stored. of: weight -> scale. quantisation: its
    quantization_config."""

    source: WeightSource
    of: Mapping[str, str]
    quantisation: Config

    @classmethod
    def among(cls, source: WeightSource, quantisation: Config) -> Scales | None:
        """Those in a source that holds other tensors too; None where there are none."""
        of = {s.removesuffix(end) + ".weight": s for s in source.names for end in SCALES if s.endswith(end)}
        return cls(source, of, quantisation) if of else None

    @property
    def block(self) -> tuple[int, int]:
        return block_of(self.quantisation)

    @cached_property
    def powers_of_two(self) -> bool:
        stored = {self.source.spec(name).dtype for name in self.of.values()}
        return self.quantisation.get("scale_fmt") == "ue8m0" or bool(stored & {torch.uint8, torch.float8_e8m0fnu})


class Fp8Source(SafetensorsSource):
    """`tensors` holds the weights without their scales; `decode` turns what is stored into fp32 values.

    `left_out` are scales of activations.
    """

    decodes = True

    def __init__(self, directory: Path, quantisation: Config, dequantised: torch.dtype) -> None:
        """quantisation: quantization_config. dequantised: dtype that FP8 weights become by default.

        Raises: MapError for an FP8 weight without a scale, ShapeError for a scale of the wrong size."""
        super().__init__(directory)
        self.quantisation, self.dequantised = quantisation, dequantised
        self.block = block_of(quantisation)
        self.scales: dict[str, str] = {}
        self._all: dict[str, StoredTensor] = dict(self.tensors)
        for name, stored in self._all.items():
            if stored.spec.dtype not in FP8:
                continue
            scale = next((s for s in (name.removesuffix(".weight") + e for e in SCALES) if s in self._all), None)
            if scale is None:
                raise MapError(f"{name} in {directory} is FP8, but {name}_scale_inv or {name}_scale is missing")
            self.scales[name] = scale
            self._check(name, scale)
        self.left_out = tuple(name for name in self._all if name.endswith(ACTIVATION_SCALES))
        gone = {*self.scales.values(), *self.left_out}
        self.tensors = {name: stored for name, stored in self._all.items() if name not in gone}
        self._scale = lru_cache(maxsize=64)(self._read_scale)

    def value_dtype(self, name: str) -> torch.dtype:
        """What a tensor becomes where no other dtype is asked for."""
        stored = self.tensors[name].spec.dtype
        return self.dequantised if stored in FP8 else stored

    def _check(self, name: str, scale: str) -> None:
        shape, stored = self._all[name].spec.shape, self._all[scale].spec.shape
        if len(shape) != 2:
            raise ShapeError(f"{name} in {self.directory} is FP8 of shape {list(shape)}; only matrices are dequantised")
        blocks = self._blocks(shape)
        if math.prod(stored) != 1 and stored not in (blocks, shape[:1], (shape[0], 1)):
            raise ShapeError(
                f"{scale} in {self.directory} has shape {list(stored)}; {name} {list(shape)} needs {list(blocks)} "
                f"(blocks of {self.block[0]} x {self.block[1]}), [{shape[0]}, 1] or [1]"
            )

    def _blocks(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.ceil(n / b) for n, b in zip(shape, self.block, strict=True))

    def _read_scale(self, scale: str) -> Tensor:
        with Files() as files:
            return from_stored(read_tensor(PlainTensors(self._all), scale, files))

    def kept(self) -> Scales:
        """The scales as they are, for whoever writes the weights in FP8 again."""
        return Scales(PlainTensors({s: self._all[s] for s in self.scales.values()}), self.scales, self.quantisation)

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        """fp32 values of raw [R, C], which are the stored rows from `row` and columns from `column` of a weight."""
        scale_name = self.scales.get(name)
        if scale_name is None:
            return raw
        scale = self._scale(scale_name)
        values = numbers_of(raw)
        rows, columns = raw.shape
        if scale.numel() == 1:
            return values.mul_(scale.reshape(()))
        if scale.shape != self._blocks(self._all[name].spec.shape):
            return values.mul_(scale.reshape(-1, 1)[row : row + rows])
        height, width = self.block
        per_row = scale[(torch.arange(rows) + row) // height]  # [R, blocks across]
        for block in range(column // width, math.ceil((column + columns) / width)):
            start, stop = max(block * width - column, 0), min((block + 1) * width - column, columns)
            values[:, start:stop].mul_(per_row[:, block : block + 1])
        return values
