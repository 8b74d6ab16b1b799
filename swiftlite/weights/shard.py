"""Shards of a Megatron tensor: reading one out of Hugging Face tensors, and writing one into them.

A shard is a rectangle of a Megatron tensor; through the rule's row gather it becomes rectangles of HF tensors. So a
rank reads and writes exactly its own bytes, without a collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from swiftlite.utils.errors import ShapeError
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import Entry, clip
from swiftlite.weights.storage import Files, WeightSource, byte_view, decoder


def _gathered(entry: Entry, rows: tuple[int, int], size: int) -> Iterator[tuple[str, Segment, slice]]:
    """(HF name, its rows, where they are in the flat shard) of op rows [start, stop). size: elements of a shard's row."""
    done = 0
    for segment in clip(entry.segments, *rows):
        yield entry.hf[segment.source], segment, slice(done, done + segment.size * size)
        done += segment.size * size


def _rectangle(entry: Entry, offset: Sequence[int], shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A shard as op rows and as elements inside a row, both [start, stop). Rows beyond the entry (vocabulary padding)
    are cut."""
    width = entry.row_size
    if not shape:
        return (0, 1), (0, 1)
    start, stop = offset[0], min(offset[0] + shape[0], entry.shape[0])
    whole = all(o == 0 and n == size for o, n, size in zip(offset[1:], shape[1:], entry.shape[1:], strict=True))
    if whole:
        per_index = math.prod(entry.shape[1:])
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
    for name, segment, place in _gathered(entry, rows, size):
        stored, target = source.spec(name).dtype, flat[place]
        raw = target if stored == dtype and decode is None else torch.empty(len(target), dtype=stored)
        first = segment.start * entry.row_size + columns[0]
        wanted = raw if size == entry.row_size else raw.view(segment.size, size)
        source.read(name, first, wanted, files)
        if raw is not target:
            target.copy_(raw if decode is None else decode(name, first, wanted))
    return out


def _runs(segment: Segment, width: int, columns: tuple[int, int]) -> list[tuple[int, int]]:
    """(first element, count) of the runs of an HF tensor that a segment's rows, `width` wide, have in these columns."""
    size = columns[1] - columns[0]
    if size == width:
        return [(segment.start * width, segment.size * width)]
    return [((segment.start + row) * width + columns[0], size) for row in range(segment.size)]


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
    flat = data.contiguous().view(-1)
    for name, segment, where in _gathered(entry, rows, columns[1] - columns[0]):
        file, base, dtype = place(name)
        view, width = byte_view(flat[where].to(dtype)), dtype.itemsize
        for number, (first, count) in enumerate(_runs(segment, entry.row_size, columns)):
            part = view[number * count * width : (number + 1) * count * width]
            files.write(file, base + first * width, part)
