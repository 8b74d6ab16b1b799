"""The closed set of weight ops. Each is a gather of rows of its inputs, so its inverse needs no code of its own.

A row is a run of consecutive elements: `row_size` says how many, by default one index of the first dimension.
`segments` lists, in the order of the Megatron tensor, which rows of which Hugging Face tensor stand there. Every row of a
Hugging Face tensor appears exactly once, in one Megatron tensor; rule.py checks it when a map is bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from swiftlite.weights.shape import ModelShape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """Rows [start, start + size) of input number `source`."""

    source: int
    start: int
    size: int


class Op:
    """Base of the ops. `rows_only`: acts on output rows alone, hence on a LoRA B matrix just as on the weight."""

    rows_only = True

    def out_shape(self, shapes: Sequence[Shape], model: ModelShape) -> Shape:
        """Shape of the Megatron tensor made of inputs of these shapes."""
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def row_size(self, shapes: Sequence[Shape], model: ModelShape) -> int:
        """Elements per row; the same for all inputs and the output."""
        return math.prod(shapes[0][1:])

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        """Input rows in output order. Default: the inputs one after the other."""
        return tuple(Segment(i, 0, s[0]) for i, s in enumerate(shapes))


@dataclass(frozen=True)
class Copy(Op):
    """One input, unchanged."""


@dataclass(frozen=True)
class ConcatRows(Op):
    """Inputs below each other: linear_fc1 = [gate; up]."""


@dataclass(frozen=True)
class QkvInterleave(Op):
    """q [N*D, H], k [G*D, H], v [G*D, H] -> per query group [its q heads; k; v], groups below each other.

    A bias drops H, lora_B has the rank for H. Source: megatron-core, SelfAttention.get_query_key_value_tensors.
    """

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        q_rows, kv_rows = shapes[0][0] // model.groups, shapes[1][0] // model.groups
        return tuple(
            Segment(source, group * size, size)
            for group in range(model.groups)
            for source, size in ((0, q_rows), (1, kv_rows), (2, kv_rows))
        )


@dataclass(frozen=True)
class GatedQkvInterleave(Op):
    """q [N*2D, H], of each head its query, then its gate -> per query group [its q heads; their gates; k; v].

    k, v [G*D, H]. Source: as QkvInterleave, with attention_output_gate.
    """

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        size, per_group = shapes[1][0] // model.groups, model.heads // model.groups
        found = []
        for group in range(model.groups):
            heads = range(group * per_group, (group + 1) * per_group)
            found += [Segment(0, (2 * head + part) * size, size) for part in (0, 1) for head in heads]
            found += [Segment(source, group * size, size) for source in (1, 2)]
        return tuple(found)


@dataclass(frozen=True)
class FusedQkv(Op):
    """[q; k; v] in one input [(N + 2G)*D, H] -> the rows of QkvInterleave."""

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        size, per_group = shapes[0][0] // (model.heads + 2 * model.groups), model.heads // model.groups
        rows = ((0, per_group), (model.heads, 1), (model.heads + model.groups, 1))
        return tuple(
            Segment(0, (start + group * heads) * size, heads * size)
            for group in range(model.groups)
            for start, heads in rows
        )


@dataclass(frozen=True)
class Take(Op):
    """One part of the input; other rules take the others.

    The input has `blocks` blocks below each other, each with a share of every part: `parts` are the rows of the parts in
    all blocks together, as names of ModelShape.
    """

    part: int
    parts: tuple[str, ...]
    blocks: str | int = 1

    def out_shape(self, shapes: Sequence[Shape], model: ModelShape) -> Shape:
        return (model.dim(self.parts[self.part]), *shapes[0][1:])

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        count = model.dim(self.blocks)
        sizes = [model.dim(part) // count for part in self.parts]
        before, size = sum(sizes[: self.part]), sizes[self.part]
        return tuple(Segment(0, block * sum(sizes) + before, size) for block in range(count))


@dataclass(frozen=True)
class SwapColumnHalves(Op):
    """[R, 2C] -> [R, 2C] with the two column halves exchanged (mimo's MTP input projection)."""

    rows_only = False

    def row_size(self, shapes: Sequence[Shape], model: ModelShape) -> int:
        return shapes[0][1] // 2

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        return tuple(Segment(0, half, 1) for row in range(shapes[0][0]) for half in (2 * row + 1, 2 * row))


@dataclass(frozen=True)
class Flatten(Op):
    """Any shape -> one dimension, same elements (ernie's [1, E] correction bias)."""

    def out_shape(self, shapes: Sequence[Shape], model: ModelShape) -> Shape:
        return (math.prod(shapes[0]),)

    def row_size(self, shapes: Sequence[Shape], model: ModelShape) -> int:
        return 1

    def segments(self, shapes: Sequence[Shape], model: ModelShape) -> tuple[Segment, ...]:
        return (Segment(0, 0, math.prod(shapes[0])),)


COPY = Copy()
CONCAT = ConcatRows()
QKV = QkvInterleave()
GATED_QKV = GatedQkvInterleave()
FUSED_QKV = FusedQkv()
SWAP_HALVES = SwapColumnHalves()
FLATTEN = Flatten()
