"""Shards of a Megatron tensor: reading one out of Hugging Face tensors, and writing one into them.

A shard is a rectangle of a Megatron tensor; through the rule's row gather it becomes rectangles of HF tensors. So a
rank reads and writes exactly its own bytes, without a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from swiftlite.utils.errors import ShapeError
from swiftlite.weights.rule import Entry, clip
from swiftlite.weights.storage import Files, WeightSource, byte_view, decoder

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Rows [row, row + count) of the shard are rows [hf_row, ...) of HF tensor `name`; a row has `width` elements."""

    name: str
    row: int
    hf_row: int
    count: int
    width: int


def pieces(entry: Entry, rows: Span) -> Iterator[Piece]:
    """Divide rows [start, stop) of an entry, in rows of its op, over the HF tensors."""
    row = 0
    for segment in clip(entry.segments, *rows):
        yield Piece(entry.hf[segment.source], row, segment.start, segment.size, entry.row_size)
        row += segment.size


def _rectangle(entry: Entry, offset: Sequence[int], shape: Sequence[int]) -> tuple[Span, Span]:
    """A shard as spans of op rows and of elements inside a row. Rows beyond the entry (vocabulary padding) are cut."""
    width = entry.row_size
    if not shape:
        return (0, 1), (0, 1)
    start, stop = offset[0], min(offset[0] + shape[0], entry.shape[0])
    whole = all(o == 0 and n == size for o, n, size in zip(offset[1:], shape[1:], entry.shape[1:], strict=True))
    if whole:
        per_index = 1
        for size in entry.shape[1:]:
            per_index *= size
        if per_index % width:
            raise ShapeError(f"{entry.label} cannot be divided at row {start}")
        scale = per_index // width
        return (start * scale, max(stop, start) * scale), (0, width)
    if len(shape) != 2 or width != entry.shape[1]:
        raise ShapeError(f"{entry.label} cannot be divided by columns")
    return (start, max(stop, start)), (offset[1], offset[1] + shape[1])


def read_shard(
    source: WeightSource, entry: Entry, offset: Sequence[int], shape: Sequence[int], files: Files, dtype: torch.dtype
) -> torch.Tensor:
    """Rows and columns of a Megatron tensor, gathered from `source`.

    Args: offset, shape: the shard within the entry, without leading [L] or [E]. Rows beyond the entry become zeros.
    Returns: [*shape], dtype `dtype`; stored values are cast.
    """
    rows, columns = _rectangle(entry, offset, shape)
    size = columns[1] - columns[0]
    out = torch.zeros(tuple(shape), dtype=dtype) if offset and offset[0] + shape[0] > entry.shape[0] else None
    out = torch.empty(tuple(shape), dtype=dtype) if out is None else out
    flat, decode = out.view(-1), decoder(source)
    for piece in pieces(entry, rows):
        stored = source.spec(piece.name).dtype
        target = flat[piece.row * size : (piece.row + piece.count) * size]
        raw = target if stored == dtype and decode is None else torch.empty(piece.count * size, dtype=stored)
        view, width = byte_view(raw), stored.itemsize
        runs = [(piece.hf_row * piece.width, piece.count * size)] if size == piece.width else [
            ((piece.hf_row + r) * piece.width + columns[0], size) for r in range(piece.count)
        ]  # fmt: skip
        done = 0
        for first, count in runs:
            for extent in source.extents(piece.name, first * width, (first + count) * width):
                files.read_into(extent, view[done : done + extent.size])
                done += extent.size
        if raw is not target:
            if decode is not None:
                raw = decode(piece.name, runs[0][0], raw if len(runs) == 1 else raw.view(len(runs), size))
            target.copy_(raw)
    return out


def write_shard(
    data: torch.Tensor,
    entry: Entry,
    offset: Sequence[int],
    files: Files,
    place: Callable[[str], tuple[Path, int, torch.dtype]],
) -> None:
    """Write a shard of a Megatron tensor to where its elements belong in Hugging Face files.

    Args: data: the shard, on the CPU. place(name): file, offset of the tensor's data, dtype it is stored in.
    """
    rows, columns = _rectangle(entry, offset, data.shape)
    size = columns[1] - columns[0]
    flat = data.contiguous().view(-1)
    for piece in pieces(entry, rows):
        file, base, dtype = place(piece.name)
        view = byte_view(flat[piece.row * size : (piece.row + piece.count) * size].to(dtype))
        width = dtype.itemsize
        if size == piece.width:
            files.write(file, base + piece.hf_row * piece.width * width, view)
            continue
        for r in range(piece.count):
            position = (piece.hf_row + r) * piece.width + columns[0]
            files.write(file, base + position * width, view[r * size * width : (r + 1) * size * width])
