"""FP8 checkpoints: weights with scales beside them, dequantised while they are read.

Forms: `weight_scale_inv`, one scale per block of rows and columns (DeepSeek-V3, Qwen3-FP8); `weight_scale`, one per row or
one per tensor (compressed-tensors, GLM-4.5-FP8). The value of a weight is its FP8 number times its scale, in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.weights.safetensors import Located, SafetensorsSource
from swiftlite.weights.storage import Files, read_tensor

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (".weight_scale_inv", ".weight_scale")
# Scales of activations and of the key/value cache: no part of the weights.
ACTIVATION_SCALES = (".input_scale", ".k_scale", ".v_scale", ".output_scale")


def open_source(directory: Path, config: Mapping[str, Any]) -> SafetensorsSource:
    """The tensors of a model directory, FP8 ones decoded. Raises: ConfigError naming a quantisation that is not read."""
    quantisation = config.get("quantization_config")
    if not quantisation:
        return SafetensorsSource(directory)
    method = str(quantisation.get("quant_method"))
    form = str(quantisation.get("format", "float-quantized"))
    if method in ("fp8", "fbgemm_fp8") or (method == "compressed-tensors" and form == "float-quantized"):
        block = quantisation.get("weight_block_size") or (128, 128)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16").removeprefix("torch.")
        return Fp8Source(directory, (int(block[0]), int(block[1])), getattr(torch, dtype))
    raise ConfigError(
        f"the weights are quantised with {method}{f' ({form})' if method == 'compressed-tensors' else ''}; of quantised "
        "weights only FP8 can be read (not AWQ, GPTQ, AQLM, bitsandbytes, MXFP4): use the unquantised model"
    )


class Fp8Source(SafetensorsSource):
    """`tensors` holds the weights without their scales; `decode` turns what is stored into fp32 values."""

    def __init__(self, directory: Path, block: tuple[int, int], dequantised: torch.dtype) -> None:
        """dequantised: dtype that FP8 weights become by default.

        Raises: MapError for an FP8 weight without a scale, ShapeError for a scale of the wrong size."""
        super().__init__(directory)
        self.block, self.dequantised = block, dequantised
        self.scales: dict[str, str] = {}
        self._all: dict[str, Located] = dict(self.tensors)
        for name, located in self._all.items():
            if located.spec.dtype not in FP8:
                continue
            scale = next((s for s in (name.removesuffix(".weight") + e for e in SCALES) if s in self._all), None)
            if scale is None:
                raise MapError(f"{name} in {directory} is FP8, but {name}_scale_inv or {name}_scale is missing")
            self.scales[name] = scale
            self._check(name, scale)
        gone = {*self.scales.values(), *(n for n in self._all if n.endswith(ACTIVATION_SCALES))}
        self.tensors = {name: located for name, located in self._all.items() if name not in gone}
        self._scale = lru_cache(maxsize=64)(self._read_scale)

    def value_dtype(self, name: str) -> torch.dtype:
        """What a tensor becomes where no other dtype is asked for."""
        stored = self.tensors[name].spec.dtype
        return self.dequantised if stored in FP8 else stored

    def _check(self, name: str, scale: str) -> None:
        shape, stored = self._all[name].spec.shape, self._all[scale].spec.shape
        if scale.endswith("_inv"):
            wanted = tuple(math.ceil(n / b) for n, b in zip(shape, self.block, strict=True))
            ok = stored == wanted
        else:
            wanted = (shape[0], 1)
            ok = math.prod(stored) in (1, shape[0])
        if not ok:
            raise ShapeError(f"{scale} in {self.directory} has shape {list(stored)}; {name} needs {list(wanted)}")

    def _read_scale(self, scale: str) -> Tensor:
        with Files() as files:
            return read_tensor(_Plain(self._all), scale, files).float()

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        """fp32 values of raw [R, C], which are the stored rows from `row` and columns from `column` of a weight."""
        scale_name = self.scales.get(name)
        if scale_name is None:
            return raw
        scale = self._scale(scale_name)
        if scale_name.endswith("_inv"):
            rows = (torch.arange(raw.shape[0]) + row) // self.block[0]
            columns = (torch.arange(raw.shape[1]) + column) // self.block[1]
            return raw.float() * scale[rows][:, columns]
        flat = scale.reshape(-1)
        return raw.float() * (flat if len(flat) == 1 else flat[row : row + raw.shape[0], None])


class _Plain:
    """The files as they are, scales included."""

    def __init__(self, tensors: Mapping[str, Located]) -> None:
        self.tensors = tensors

    spec = SafetensorsSource.spec
    extents = SafetensorsSource.extents
