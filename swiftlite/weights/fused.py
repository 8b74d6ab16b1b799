"""Experts that a checkpoint keeps in one tensor [E, A, B]: where those of single experts lie in it. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from swiftlite.weights.ops import Shape


@dataclass(frozen=True)
class View:
    """Where a tensor [R, C] (a bias [R]: C = 1) lies in the matrix [A, B] of expert `expert`.

    Its row r is the matrix' row start + r step or, transposed, the matrix' column of that number.
    """

    expert: int
    shape: tuple[int, int]
    start: int
    step: int
    transposed: bool


@dataclass(frozen=True)
class FusedTensor:
    """A tensor [E, A, B], or of biases [E, A], made of the experts' tensors `views`. of_part: see rule.Fused."""

    name: str
    shape: Shape
    views: Mapping[str, View]
    of_part: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """A, B; 1 for B of biases."""
        return self.shape[1], (*self.shape, 1)[2]

    @property
    def turned(self) -> FusedTensor:
        """The same with the matrices kept the other way, [E, B, A]; biases stay as they are."""
        if len(self.shape) == 2:
            return self
        views = {part: replace(view, transposed=not view.transposed) for part, view in self.views.items()}
        return replace(self, shape=(self.shape[0], self.shape[2], self.shape[1]), views=views)

    def part_shape(self, part: str) -> Shape:
        rows, columns = self.views[part].shape
        return (rows,) if len(self.shape) == 2 else (rows, columns)

    def offset(self, part: str) -> int | None:
        """Number of the part's first element in this tensor, if the part is a run of it."""
        view, (high, wide) = self.views[part], self.matrix
        return None if view.step > 1 or view.transposed else (view.expert * high + view.start) * wide

    @cached_property
    def experts(self) -> Sequence[Sequence[tuple[str, View]]]:
        """The parts of each expert."""
        found: list[list[tuple[str, View]]] = [[] for _ in range(self.shape[0])]
        for part, view in self.views.items():
            found[view.expert].append((part, view))
        return found

    @classmethod
    def of(
        cls, name: str, parts: list[list[str]], shapes: Mapping[str, Shape], transposed: bool, interleaved: bool
    ) -> FusedTensor:
        """parts: of each expert, in order. shapes: of the parts."""
        views: dict[str, View] = {}
        rows = sum(shapes[part][0] for part in parts[0])
        columns = shapes[parts[0][0]][1:]
        assert not interleaved or len({shapes[part] for part in parts[0]}) == 1, f"parts of {name} differ"
        for expert, own in enumerate(parts):
            start = 0
            for number, part in enumerate(own):
                shape = (shapes[part][0], (*shapes[part], 1)[1])
                place = (number, len(own)) if interleaved else (start, 1)
                views[part] = View(expert, shape, *place, transposed and bool(columns))
                start += shape[0]
        size = (*columns, rows) if transposed else (rows, *columns)
        return cls(name, (len(parts), *size), views)
