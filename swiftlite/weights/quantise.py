"""Weights on their way to FP8: a source of which chosen ones are quantised while they are read, with scales beside them.

A scale is the largest number of its block, row or tensor over 448, the largest of E4M3, and numbers are divided by it and
rounded once. Where weights came from FP8 and their own scales give every number of a block again, those scales stay.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from swiftlite.utils.errors import CheckpointError
from swiftlite.weights.fp8 import BLOCK, Scales, as_stored
from swiftlite.weights.ops import Shape
from swiftlite.weights.packed import from_stored
from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, Wrapped, decoder, read_tensor

FORMS = ("block", "channel", "tensor")
LARGEST = 448.0
CHUNK = 1 << 17  # numbers that are worked on together, in fp32


def scale_name(weight: str, form: str) -> str:
    return f"{weight}_scale_inv" if form == "block" else f"{weight}_scale"


class Quantised(Wrapped):
    """`base` with the matrices `weights` in E4M3, and their scales."""

    def __init__(self, base: WeightSource, weights: Collection[str], form: str, kept: Scales | None = None) -> None:
        """form: one of FORMS. kept: scales of the checkpoint that `base` is made of."""
        super().__init__(base)
        self.weights, self.form = set(weights), form
        self.kept = kept
        self.scaled = {scale_name(weight, form): weight for weight in weights}
        self.own = {*self.weights, *self.scaled}
        self._decode = decoder(base)
        self._locks: dict[str, threading.Lock] = {}
        self._cached = lru_cache(maxsize=64)(self._computed)

    @property
    def names(self) -> Collection[str]:
        return {*self.base.names, *self.scaled}

    def spec(self, name: str) -> TensorSpec:
        if name in self.weights:
            return TensorSpec(torch.float8_e4m3fn, self.base.spec(name).shape)
        return self._scale_spec(self.scaled[name]) if name in self.scaled else self.base.spec(name)

    def value_dtype(self, name: str) -> torch.dtype:
        return self.spec(name).dtype if name in self.own else self.base.value_dtype(name)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """For the place of a tensor; that of a scale is its weight's."""
        return self.base.extents(self.scaled.get(name, name), start, stop)

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        return raw if name in self.own else self.base.decode(name, row, column, raw)

    def read(self, name: str, first: int, out: Tensor, files: Files) -> None:
        if name in self.scaled:
            weight = self.scaled[name]
            stored = as_stored(self._scales(weight), self._scale_spec(weight).dtype)
            out.copy_(stored.reshape(-1)[first : first + out.numel()].view(out.shape))
        elif name in self.weights:
            scales, wide = self._scales(name), self.base.spec(name).shape[1]
            row, column = divmod(first, wide)
            block = out if out.dim() == 2 else out.view(-1, min(wide, out.numel()))
            for start, values in self._values(name, row, column, block.shape, files):
                whole = self.spread(name, scales, row + start, column, values.shape)
                block[start : start + len(values)] = (values.float() / whole).to(block.dtype)
        else:
            self.base.read(name, first, out, files)

    def _values(self, name: str, row: int, column: int, shape: Shape, files: Files) -> Iterator[tuple[int, Tensor]]:
        """(first row, values) of a rectangle's rows, some at a time, numbered from `row`."""
        spec, step = self.base.spec(name), max(CHUNK // max(shape[1], 1), 1)
        for start in range(0, shape[0], step):
            raw = torch.empty(min(step, shape[0] - start), shape[1], dtype=spec.dtype)
            first = (row + start) * spec.shape[1] + column
            self.base.read(name, first, raw.view(-1) if shape[1] == spec.shape[1] else raw, files)
            yield start, raw if self._decode is None else self._decode(name, first, raw).view(raw.shape)

    # ---- scales: a grid [blocks down, blocks across] in fp32 ----

    def _block(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, columns = max(shape[0], 1), max(shape[1], 1)
        return {"block": BLOCK, "channel": (1, columns), "tensor": (rows, columns)}[self.form]

    def grid(self, shape: Shape) -> tuple[int, int]:
        height, width = self._block(shape)
        return -(-shape[0] // height), -(-shape[1] // width)

    def spread(self, name: str, scales: Tensor, row: int, column: int, shape: Shape) -> Tensor:
        """[rows, columns or 1]: the scale of each number of a rectangle."""
        height, width = self._block(self.base.spec(name).shape)
        of_rows = scales[(torch.arange(shape[0]) + row) // height]
        return of_rows if scales.shape[1] == 1 else of_rows[:, (torch.arange(shape[1]) + column) // width]

    def _kept_spec(self, weight: str) -> TensorSpec | None:
        """Of the scales that the checkpoint had, if they are of this form."""
        name = scale_name(weight, self.form)
        if self.kept is None or self.kept.of.get(weight) != name:
            return None
        spec, shape = self.kept.source.spec(name), self.base.spec(weight).shape
        fits = {
            "block": self.kept.block == BLOCK and spec.shape == self.grid(shape),
            "channel": spec.shape in (shape[:1], (shape[0], 1)),
            "tensor": math.prod(spec.shape) == 1,
        }
        return spec if fits[self.form] else None

    def _scale_spec(self, weight: str) -> TensorSpec:
        shape = (1,) if self.form == "tensor" else self.grid(self.base.spec(weight).shape)
        return self._kept_spec(weight) or TensorSpec(torch.float32, shape)

    def _scales(self, weight: str) -> Tensor:
        """Computed by one thread, though others ask at the same time."""
        with self._locks.setdefault(weight, threading.Lock()):
            return self._cached(weight)

    def _computed(self, weight: str) -> Tensor:
        shape = self.base.spec(weight).shape
        height, width = self._block(shape)
        largest, changed = torch.zeros(self.grid(shape)), torch.zeros(self.grid(shape))
        with Files() as files:
            kept = self._kept(weight, files)
            for start, values in self._values(weight, 0, 0, shape, files):
                numbers = values.float()
                _enter(largest, start, height, _across(numbers.abs(), width))
                if kept is not None:
                    whole = self.spread(weight, kept, start, 0, values.shape)
                    again = (numbers / whole).to(torch.float8_e4m3fn).float() * whole
                    differs = (again.to(values.dtype) != values).float()
                    _enter(changed, start, height, _across(differs, width))
        if not bool(largest.isfinite().all()):
            raise CheckpointError(f"{weight} holds numbers that are not finite, which FP8 cannot hold")
        scales = torch.where(largest > 0, (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
        if self.kept is not None and self.kept.powers_of_two:
            fraction, exponent = torch.frexp(scales)
            scales = torch.ldexp(torch.ones(()), exponent - (fraction == 0.5).int())
        scales = from_stored(as_stored(scales, self._scale_spec(weight).dtype))
        return scales if kept is None else torch.where(changed > 0, scales, kept)

    def _kept(self, weight: str, files: Files) -> Tensor | None:
        if self.kept is None or self._kept_spec(weight) is None:
            return None
        stored = read_tensor(self.kept.source, self.kept.of[weight], files)
        return from_stored(stored).reshape(self.grid(self.base.spec(weight).shape))


def _across(numbers: Tensor, width: int) -> Tensor:
    """[R, C] -> [R, blocks of `width` across]: the largest number in each."""
    if width >= numbers.shape[1]:
        return numbers.amax(1, keepdim=True)
    return pad(numbers, (0, -numbers.shape[1] % width)).view(len(numbers), -1, width).amax(2)


def _enter(grid: Tensor, start: int, height: int, found: Tensor) -> None:
    """Let the blocks of a grid know the largest numbers of rows from `start` on."""
    if height == 1:
        grid[start : start + len(found)] = found
        return
    for block in range(start // height, -(-(start + len(found)) // height)):
        rows = found[max(block * height - start, 0) : (block + 1) * height - start]
        grid[block] = torch.maximum(grid[block], rows.amax(0))
