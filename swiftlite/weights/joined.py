"""Experts that a checkpoint keeps in one tensor [E, A, B], seen as the tensors of single experts, and the way back.

Everything else knows single experts only: rules, adapters, shards. Either way a part is read in rectangles, so memory
does not depend on the size of a tensor, also where a part lies in it transposed or in every second column.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

import torch

from swiftlite.weights.fused import FusedTensor, View
from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, Wrapped, decoder

GAP, READ_BYTES = 3, 1 << 18  # a range of which a third is needed is read in one piece, up to so many bytes


class Parts(Wrapped):
    """A source that keeps experts in one tensor, under the names of single experts. What is decoded comes in fp32."""

    def __init__(self, base: WeightSource, fused: Collection[FusedTensor]) -> None:
        super().__init__(base)
        self.fused = {tensor.name: tensor for tensor in fused}
        self._of = {part: tensor for tensor in fused for part in tensor.views}
        self._decode = decoder(base)

    @cached_property
    def names(self) -> Collection[str]:  # type: ignore[override]
        parts = ((*self.fused[n].views,) if n in self.fused else (n,) for n in self.base.names)
        return dict.fromkeys(name for some in parts for name in some)

    def spec(self, name: str) -> TensorSpec:
        tensor = self._of.get(name)
        if tensor is None:
            return self.base.spec(name)
        dtype = torch.float32 if self.decodes else self.base.spec(tensor.name).dtype
        return TensorSpec(dtype, tensor.part_shape(name))

    def value_dtype(self, name: str) -> torch.dtype:
        return self.base.value_dtype(self._of[name].name if name in self._of else name)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """Element by element where they do not lie together: for the place of a tensor, not for reading it."""
        tensor = self._of.get(name)
        if tensor is None:
            yield from self.base.extents(name, start, stop)
            return
        view, width = tensor.views[name], self.base.spec(tensor.name).dtype.itemsize
        together = tensor.offset(name) is not None
        position = start
        while position < stop:
            element, inside = divmod(position, width)
            size = stop - position if together else min(width - inside, stop - position)
            first = self._element(tensor, view, *divmod(element, view.shape[1])) * width + inside
            yield from self.base.extents(tensor.name, first, first + size)
            position += size

    @staticmethod
    def _element(tensor: FusedTensor, view: View, row: int, column: int) -> int:
        """Number of the view's element [row, column] in the fused tensor."""
        high, wide = tensor.matrix
        down, across = (
            (column, view.start + row * view.step) if view.transposed else (view.start + row * view.step, column)
        )
        return (view.expert * high + down) * wide + across

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        tensor = self._of.get(name)
        if tensor is None:
            self.base.read(name, first, out, files)
            return
        view = tensor.views[name]
        row, column = divmod(first, view.shape[1])
        block = out if out.dim() == 2 else out.view(-1, min(view.shape[1], out.numel()))
        start = self._element(tensor, view, row, column)
        wide, (rows, columns) = tensor.matrix[1], block.shape
        if not view.transposed:
            self._lines(tensor.name, start, rows, view.step * wide, columns, block, files)
            return
        lines = torch.empty(columns, (rows - 1) * view.step + 1, dtype=out.dtype)
        self._lines(tensor.name, start, columns, wide, lines.shape[1], lines, files)
        block.copy_(lines[:, :: view.step].T)

    def scattered(self, name: str) -> bool:
        return self._of[name].offset(name) is None if name in self._of else self.base.scattered(name)

    def _lines(
        self, name: str, first: int, count: int, stride: int, size: int, out: torch.Tensor, files: Files
    ) -> None:
        """Fill out [count, size] with runs of `size` elements that are `stride` apart; a run lies in one row."""
        spec = self.base.spec(name)
        wide, span = spec.shape[-1], (count - 1) * stride + size
        if stride in (wide, size):
            self._values(name, first, out.view(-1) if stride == size else out, files)
        elif self._decode is None and span <= GAP * out.numel() and span * spec.dtype.itemsize <= READ_BYTES:
            together = torch.empty(span, dtype=spec.dtype)
            self.base.read(name, first, together, files)
            out.copy_(together.as_strided((count, size), (stride, 1)))
        else:
            for number in range(count):
                self._values(name, first + number * stride, out[number], files)

    def _values(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        """Fill `out` with values of a run or rectangle of the base."""
        raw = out if self._decode is None else torch.empty(out.shape, dtype=self.base.spec(name).dtype)
        self.base.read(name, first, raw, files)
        if self._decode is not None:
            out.copy_(self._decode(name, first, raw).view(out.shape))

    def decode(self, name: str, row: int, column: int, raw: torch.Tensor) -> torch.Tensor:
        return raw if name in self._of else self.base.decode(name, row, column, raw)


class Joined(Wrapped):
    """A source of single experts that has the tensors of all experts too. What is decoded comes in fp32."""

    def __init__(self, base: WeightSource, fused: Collection[FusedTensor]) -> None:
        super().__init__(base)
        self.fused = {tensor.name: tensor for tensor in fused}
        self._decode = decoder(base)

    @cached_property
    def names(self) -> Collection[str]:  # type: ignore[override]
        return {**self.fused, **dict.fromkeys(self.base.names)}

    def _first(self, name: str) -> str:
        return next(iter(self.fused[name].views)) if name in self.fused else name

    def spec(self, name: str) -> TensorSpec:
        tensor, base = self.fused.get(name), self.base.spec(self._first(name))
        if tensor is None:
            return base
        return TensorSpec(torch.float32 if self.decodes else base.dtype, tensor.shape)

    def value_dtype(self, name: str) -> torch.dtype:
        return self.base.value_dtype(self._first(name))

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """Of the first part, for the place of a tensor."""
        return self.base.extents(self._first(name), start, stop)

    def read(self, name: str, first: int, out: torch.Tensor, files: Files) -> None:
        tensor = self.fused.get(name)
        if tensor is None:
            self.base.read(name, first, out, files)
            return
        high, wide = tensor.matrix
        row, column = divmod(first, wide)
        block = out if out.dim() == 2 else out.view(-1, min(wide, out.numel()))
        done = 0
        while done < block.shape[0]:
            expert, down = divmod(row + done, high)
            count = min(high - down, block.shape[0] - done)
            self._expert(tensor, expert, down, column, block[done : done + count], files)
            done += count

    def scattered(self, name: str) -> bool:
        tensor = self.fused.get(name)
        if tensor is None:
            return self.base.scattered(name)
        return any(tensor.offset(part) is None for part in tensor.views)

    def _expert(
        self, tensor: FusedTensor, expert: int, down: int, across: int, out: torch.Tensor, files: Files
    ) -> None:
        """Fill `out` with a rectangle of one expert's matrix, its first element being [down, across]."""
        for name, view in tensor.experts[expert]:
            start, size = (across, out.shape[1]) if view.transposed else (down, out.shape[0])
            low = max(-(-(start - view.start) // view.step), 0)
            rows = min(-(-(start + size - view.start) // view.step), view.shape[0]) - low
            if rows <= 0:
                continue
            place = slice(view.start + low * view.step - start, None, view.step)
            target = out[:, place].T[:rows] if view.transposed else out[place][:rows]
            column, columns = (down, out.shape[0]) if view.transposed else (across, out.shape[1])
            values = torch.empty(rows, columns, dtype=self.base.spec(name).dtype)
            first = low * view.shape[1] + column
            self.base.read(name, first, values.view(-1) if columns == view.shape[1] else values, files)
            target.copy_(values if self._decode is None else self._decode(name, first, values).view(values.shape))

    def decode(self, name: str, row: int, column: int, raw: torch.Tensor) -> torch.Tensor:
        return raw if name in self.fused else self.base.decode(name, row, column, raw)
