"""A checkpoint becomes a Hugging Face directory; or those of its tensors that Megatron does not hold become files beside.

What a plan has: see conversion.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.files import main_dtype
from swiftlite.convert.quantised import quantised
from swiftlite.utils.directories import CARRIED
from swiftlite.weights import stream
from swiftlite.weights.ops import Segment
from swiftlite.weights.safetensors import (
    PlainTensors,
    SafetensorsSource,
    ShardPlan,
    create_shards,
    places_in,
    plan_shards,
    write_index,
)
from swiftlite.weights.storage import Beside, TensorSpec, WeightSource, place_of

SHARD_BYTES = 5 * 10**9  # of a safetensors file, at most, where nothing else is asked for


@dataclass(frozen=True)
class HfTarget:
    """A model directory. dtype: converts to this; None keeps what is stored. max_shard_bytes: of a file; None: as the
    files of the original were, where they are known. fp8: matrices are quantised, see weights/quantise.py."""

    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None
    fp8: str | None = None

    def plan(self, source: Checkpoint) -> HfPlan:
        if self.fp8 is not None:
            source = quantised(source, self.fp8)
        return HfPlan.of(source, {}, self.dtype, self.max_shard_bytes)


@dataclass(frozen=True)
class HfPlan:
    """specs: output tensors in file order."""

    kind = "Hugging Face model"
    source: Checkpoint
    specs: Mapping[str, TensorSpec]
    shards: Sequence[ShardPlan]
    options: Sequence[object]

    @classmethod
    def of(
        cls, source: Checkpoint, held: Mapping[str, torch.dtype], dtype: torch.dtype | None = None,
        max_shard_bytes: int | None = None,
    ) -> HfPlan:  # fmt: skip
        """held: dtypes of tensors that are not read from the source but from a live model."""
        source.check_whole()
        specs, bound = {}, source.bound
        for name in source.names:
            of = source.copies.get(name, name)
            target = held.get(bound.parts(of)[0]) or dtype or source.stored.value_dtype(of)
            kept = name in source.carried or bound.rule(of).keep_dtype
            specs[name] = TensorSpec(source.dtypes[name] if kept else target, source.shape_of(name))
        layout = source.files if source.files and max_shard_bytes is None else None
        shards = plan_shards(specs, max_shard_bytes or SHARD_BYTES, layout)
        return cls(source, specs, shards, ["to_hf", str(dtype), source.changes, [[s.file, s.size] for s in shards]])

    @property
    def sizes(self) -> Sequence[int]:
        return [shard.size for shard in self.shards]

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def places(self, directory: Path) -> dict[str, tuple[Path, int]]:
        """tensor -> (file, offset of its data)."""
        return places_in(directory, self.shards)

    def prepare(self, directory: Path) -> None:
        create_shards(directory, self.shards)

    def jobs(self, directory: Path) -> list[stream.Job]:
        return copy_jobs(self.source.stored, self.specs, self.places(directory), self.source.copies)

    def publish(self, directory: Path, hashes: Mapping[str, str] | None = None) -> None:
        plain = [spec for name, spec in self.specs.items() if name not in self.source.carried]
        self.source.write_side_files(directory, main_dtype((s.dtype, s.numel) for s in plain))
        write_index(directory, self.shards, self.total_bytes)

    def written(self, directory: Path) -> WeightSource:
        return SafetensorsSource(directory)


def copy_jobs(
    source: WeightSource, specs: Mapping[str, TensorSpec], places: Mapping[str, tuple[Path, int]],
    copies: Mapping[str, str],
) -> list[stream.Job]:  # fmt: skip
    """Copy tensors to their places, in the order of the source's files. copies: see Checkpoint."""
    of = {name: copies.get(name, name) for name in places}
    ordered = sorted(places, key=lambda name: place_of(source, of[name]))
    return [copy_job(source, of[name], *places[name], specs[name].dtype) for name in ordered]


def copy_job(source: WeightSource, name: str, file: Path, offset: int, dtype: torch.dtype) -> stream.Job:
    """Copy one tensor as it is, but for its dtype."""
    spec = source.spec(name)
    row_size = spec.shape[-1] if len(spec.shape) > 1 else 1
    rows = (Segment(0, 0, spec.numel // row_size),) if spec.numel else ()
    return stream.Job(name, (name,), rows, row_size, source, dtype, file, offset)


@dataclass(frozen=True)
class CarriedPlan:
    """The files beside a Megatron checkpoint: tensors of other parts than the text model, and the scales that FP8 weights
    had. None for a model that is all text and was plain."""

    source: Checkpoint

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        held, carried = self.source.source, self.source.carried
        parts = {n: TensorSpec(held.value_dtype(n), held.spec(n).shape) for n in self.source.names if n in carried}
        return {**parts, **{name: self._scales.spec(name) for name in self._scales.names}}

    @property
    def _scales(self) -> WeightSource:
        return self.source.scales.source if self.source.scales else PlainTensors({})

    @cached_property
    def shards(self) -> Sequence[ShardPlan]:
        is_part = self.source.bound.naming is not None and self.source.whole
        return plan_shards(self.specs, SHARD_BYTES) if is_part or self._scales.names else ()

    def prepare(self, directory: Path) -> None:
        if self.shards:
            (directory / CARRIED).mkdir()
            create_shards(directory / CARRIED, self.shards)
            write_index(directory / CARRIED, self.shards, sum(spec.nbytes for spec in self.specs.values()))

    def jobs(self, directory: Path) -> list[stream.Job]:
        source = Beside(self.source.source, self._scales)
        return copy_jobs(source, self.specs, places_in(directory / CARRIED, self.shards), {})

    def written(self, directory: Path) -> WeightSource | None:
        return SafetensorsSource(directory / CARRIED) if self.shards else None
