"""Weights of 4 bits, two in a byte, with a scale for a group of them in a row; unpacked while they are read.

MXFP4 (gpt-oss): `*_blocks` [E, R, G, 16] and `*_scales` [E, R, G] are a tensor [E, 32 G, R], which is written transposed.
INT4 of compressed-tensors (Kimi-K2-Thinking): `weight_packed` [R, C / 8], `weight_scale` [R, C / group], `weight_shape`.
The lower half of a byte comes first. A value is its number times its scale, in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.utils.types import Config
from swiftlite.weights.ops import Shape
from swiftlite.weights.safetensors import PlainTensors, SafetensorsSource, StoredTensor
from swiftlite.weights.storage import Files, TensorSpec, read_tensor

BLOCKS, PACKED = "_blocks", ".weight_packed"
PARTS = ("_scales", ".weight_scale", ".weight_shape")
MXFP4_GROUP = 32


def _pairs(numbers: Tensor) -> Tensor:
    """[256, 2]: the numbers in a byte, of those that 4 bits can be."""
    return torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), 1)


_POSITIVE = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MXFP4 = _pairs(torch.cat((_POSITIVE, -_POSITIVE)))
INT4 = _pairs(torch.arange(-8.0, 8.0))


def from_stored(scales: Tensor) -> Tensor:
    """Scales in fp32. Powers of two are stored as their exponents, by some tools as plain bytes."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def value_name(name: str) -> str | None:
    """What a stored tensor is called once it is unpacked; None for scales and shapes."""
    if name.endswith(PARTS):
        return None
    return name.removesuffix(BLOCKS) if name.endswith(BLOCKS) else name.replace(PACKED, ".weight")


@dataclass(frozen=True)
class Packed:
    """Numbers of a matrix [R, C] as they are stored: bytes `data` [R, C / 2], `scale` [R, C / group].

    pairs: [256, 2], the numbers in a byte. transposed: the tensor that they are has the matrices of its experts transposed.
    """

    data: StoredTensor
    scale: StoredTensor
    pairs: Tensor
    group: int
    transposed: bool = False

    def values(self, rows: tuple[int, int], columns: tuple[int, int], files: Files) -> Tensor:
        """fp32 values of rows and columns [start, stop); whole groups are unpacked."""
        low, high = columns[0] // self.group, -(-columns[1] // self.group)
        start, stop = low * self.group, min(high * self.group, self.data.spec.shape[1] * 2)
        raw = self._read(self.data, rows, (start // 2, -(-stop // 2)), files)
        found = torch.index_select(self.pairs, 0, raw.view(-1).int()).view(len(raw), -1)
        found = found[:, start % 2 : start % 2 + stop - start]
        scale = from_stored(self._read(self.scale, rows, (low, high), files))
        whole = (stop - start) // self.group
        found[:, : whole * self.group].view(len(raw), whole, -1).mul_(scale[:, :whole, None])
        found[:, whole * self.group :].mul_(scale[:, whole:])  # the last group may be cut
        return found[:, columns[0] - start : columns[1] - start]

    @staticmethod
    def _read(stored: StoredTensor, rows: tuple[int, int], columns: tuple[int, int], files: Files) -> Tensor:
        out = torch.empty(rows[1] - rows[0], columns[1] - columns[0], dtype=stored.spec.dtype)
        first = rows[0] * stored.spec.shape[1] + columns[0]
        PlainTensors({"": stored}).read("", first, out, files)
        return out


class PackedSource(SafetensorsSource):
    """`tensors` holds the weights without their scales. What is packed reads as fp32, its place is that of its numbers."""

    decodes = True

    def __init__(self, directory: Path, dequantised: torch.dtype, quantisation: Config) -> None:
        """dequantised: dtype that packed weights become by default.

        Raises: ConfigError for a kind that is not read; MapError, ShapeError for scales that are missing or do not fit.
        """
        super().__init__(directory)
        self.dequantised = dequantised
        self.group = _group_of(quantisation)
        stored, self.tensors = self.tensors, {}
        self.packed: dict[str, Packed] = {}
        with Files() as files:
            for name, tensor in stored.items():
                plain = value_name(name)
                if plain == name:
                    self.tensors[name] = tensor
                elif plain is not None:
                    unpack = self._mxfp4 if name.endswith(BLOCKS) else self._int4
                    shape = unpack(name, plain, stored, files)
                    self.tensors[plain] = StoredTensor(TensorSpec(torch.float32, shape), tensor.file, tensor.offset)
        used = {name.removesuffix(BLOCKS) for name in stored} | {name.removesuffix(PACKED) for name in stored}
        lone = next((n for n in stored if n.endswith(PARTS) and _base(n) not in used), None)
        if lone is not None:
            raise MapError(f"{lone} in {directory} belongs to no packed weight; download the missing file")

    def _mxfp4(self, name: str, plain: str, stored: dict[str, StoredTensor], files: Files) -> Shape:
        blocks, scales = stored[name], self._part(f"{plain}_scales", name, stored)
        shape = blocks.spec.shape
        if len(shape) != 4 or shape[3] * 2 != MXFP4_GROUP or scales.spec.shape != shape[:3]:
            raise ShapeError(
                f"{name} in {self.directory} has shape {list(shape)}, its scales {list(scales.spec.shape)}; they must be "
                "[E, R, G, 16] and [E, R, G]"
            )
        experts, rows, groups, size = shape
        data = _as_matrix(blocks, (experts * rows, groups * size))
        scale = _as_matrix(scales, (experts * rows, groups))
        self.packed[plain] = Packed(data, scale, MXFP4, MXFP4_GROUP, transposed=True)
        return experts, groups * MXFP4_GROUP, rows

    def _int4(self, name: str, plain: str, stored: dict[str, StoredTensor], files: Files) -> Shape:
        base = name.removesuffix(PACKED)
        words, scale = stored[name], self._part(f"{base}.weight_scale", name, stored)
        self._part(f"{base}.weight_shape", name, stored)
        shape = tuple(read_tensor(PlainTensors(stored), f"{base}.weight_shape", files).tolist())
        group = self.group or (shape[1] if len(shape) == 2 else 1)
        wanted = [(shape[0], -(-size // each)) for size, each in ((shape[-1], 8), (shape[-1], group))]
        found = [words.spec.shape, scale.spec.shape]
        if len(shape) != 2 or found != wanted or words.spec.dtype != torch.int32:
            raise ShapeError(
                f"{name} and its scales in {self.directory} have shapes {[list(s) for s in found]}; for a weight of "
                f"{list(shape)} in groups of {group} they must be {[list(s) for s in wanted]}"
            )
        data = _as_matrix(words, (shape[0], words.spec.shape[1] * 4))
        self.packed[plain] = Packed(data, scale, INT4, group)
        return shape

    def _part(self, part: str, name: str, stored: dict[str, StoredTensor]) -> StoredTensor:
        if part not in stored:
            raise MapError(f"{name} in {self.directory} is packed, but {part} is missing")
        return stored[part]

    def value_dtype(self, name: str) -> torch.dtype:
        """What a tensor becomes where no other dtype is asked for."""
        return self.dequantised if name in self.packed else self.tensors[name].spec.dtype

    def scattered(self, name: str) -> bool:
        return name in self.packed and self.packed[name].transposed

    def read(self, name: str, first: int, out: Tensor, files: Files) -> None:
        packed = self.packed.get(name)
        if packed is None:
            super().read(name, first, out, files)
            return
        shape = self.tensors[name].spec.shape
        row, column = divmod(first, shape[-1])
        block = out if out.dim() == 2 else out.view(-1, min(shape[-1], out.numel()))
        rows, columns = (row, row + block.shape[0]), (column, column + block.shape[1])
        if not packed.transposed:
            block.copy_(packed.values(rows, columns, files))
            return
        for expert in range(row // shape[1], -(-rows[1] // shape[1])):
            start, before = expert * shape[1], expert * shape[2]
            low, high = max(row, start), min(rows[1], start + shape[1])
            lines = (before + columns[0], before + columns[1])
            block[low - row : high - row] = packed.values(lines, (low - start, high - start), files).T


def _base(name: str) -> str:
    return next(name.removesuffix(part) for part in PARTS if name.endswith(part))


def _as_matrix(stored: StoredTensor, shape: Shape) -> StoredTensor:
    """The same bytes as `shape`, 32-bit words as their bytes."""
    dtype = torch.uint8 if stored.spec.dtype == torch.int32 else stored.spec.dtype
    assert math.prod(shape) * dtype.itemsize == stored.spec.nbytes
    return StoredTensor(TensorSpec(dtype, shape), stored.file, stored.offset)


def _group_of(quantisation: Config) -> int | None:
    """Numbers that share a scale in weights of compressed-tensors; None: a whole row does."""
    if str(quantisation.get("quant_method")) == "mxfp4":
        return None
    written = [group.get("weights") or {} for group in (quantisation.get("config_groups") or {}).values()]
    kinds = {
        (w.get("num_bits"), bool(w.get("symmetric", True)), w.get("actorder"), w.get("group_size")) for w in written
    }
    if len(kinds) == 1:
        bits, symmetric, order, group = kinds.pop()
        if (bits, symmetric, order) == (4, True, None):
            return int(group) if group and int(group) > 0 else None
    said = sorted(
        f"{bits} bits, {'' if symmetric else 'a'}symmetric, actorder {order or 'none'}, group size {group or 'none'}"
        for bits, symmetric, order, group in kinds
    )
    raise ConfigError(
        f"the weights are packed with {' and with '.join(said) or 'nothing that is said'}; of weights packed by "
        "compressed-tensors only symmetric ones of 4 bits, all alike, can be read: use the unquantised model"
    )
