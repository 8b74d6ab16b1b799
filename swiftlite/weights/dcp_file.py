"""A directory of torch.distributed.checkpoint files, by global tensors: read through `.metadata`, planned and written.

It knows chunks, records and files; which tensor of a model a name means is torch_dist.py's.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from swiftlite.utils.directories import TRACKER
from swiftlite.utils.errors import CheckpointError, reason
from swiftlite.utils.io import blame, is_inside, plain_name, write_bytes_atomic, write_text_atomic
from swiftlite.utils.types import Json
from swiftlite.weights.ops import Shape
from swiftlite.weights.storage import Extent, TensorSpec, WeightSource
from swiftlite.weights.torch_record import data_offset, record_of
from swiftlite.weights.unpickle import read_metadata

ITERATION = "iter_0000001"  # of a checkpoint that no run wrote
SHARDED_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Not model weights: skipped by name when a training checkpoint is read.
STATE_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
STATE_PARTS = ("_extra_state",)


# ---- reading ----


def is_state(name: str) -> bool:
    """True for optimizer, rng and other entries that are not model weights."""
    return name.startswith(STATE_PREFIXES) or any(part in name for part in STATE_PARTS)


@dataclass(frozen=True)
class _Chunk:
    """A hyper-rectangle of a global tensor: its corner, its sizes and its record in a file."""

    corner: Shape
    sizes: Shape
    file: Path
    offset: int
    length: int


class _Chunks:
    """The chunks of one tensor, found by position."""

    def __init__(self, name: str, spec: TensorSpec, chunks: Sequence[_Chunk]) -> None:
        self.name, self.spec = name, spec
        self.chunks = chunks
        stored = sum(math.prod(c.sizes) for c in chunks)
        if stored != spec.numel:
            raise CheckpointError(
                f"{name} has {spec.numel} elements, its chunks {stored}; the checkpoint is incomplete"
            )
        self._starts = [sorted({c.corner[d] for c in chunks}) for d in range(len(spec.shape))]
        self._at = {c.corner: c for c in chunks}

    def find(self, position: Sequence[int]) -> _Chunk:
        corner = tuple(s[bisect.bisect_right(s, p) - 1] for s, p in zip(self._starts, position, strict=True))
        chunk = self._at.get(corner)
        if chunk is not None and all(p < c + n for p, c, n in zip(position, chunk.corner, chunk.sizes, strict=True)):
            return chunk
        for chunk in self.chunks:  # irregular division
            if all(c <= p < c + n for p, c, n in zip(position, chunk.corner, chunk.sizes, strict=True)):
                return chunk
        raise CheckpointError(f"no chunk of {self.name} holds element {list(position)}; the checkpoint is incomplete")

    def runs(self, start: int, stop: int) -> Iterator[tuple[_Chunk, int, int]]:
        """Divide elements [start, stop) of the row-major tensor into (chunk, element in the chunk, count)."""
        shape = self.spec.shape
        while start < stop:
            position, rest = [], start
            for d in range(len(shape)):
                step = math.prod(shape[d + 1 :])
                position.append(rest // step)
                rest %= step
            chunk = self.find(position)
            local = [p - c for p, c in zip(position, chunk.corner, strict=True)]
            inside = 0
            for value, size in zip(local, chunk.sizes, strict=True):
                inside = inside * size + value
            # Contiguous until the first dimension, from the right, that the chunk does not span whole.
            count, d = 1, len(shape) - 1
            while d >= 0 and chunk.sizes[d] == shape[d]:
                d -= 1
            block = math.prod(chunk.sizes[max(d, 0) :]) if shape else 1
            count = block - inside % block
            count = min(count, stop - start)
            yield chunk, inside, count
            start += count


class TorchDistSource(WeightSource):
    """One `iter_*` directory. Opening it reads `.metadata` only. Names are global keys such as `decoder.layers.3.…`.

    data: whether the files that hold the tensors must be there; a plan does without.
    """

    def __init__(self, directory: Path, data: bool = True) -> None:
        self.directory = directory
        self._starts: dict[tuple[Path, int], int] = {}
        path = directory / ".metadata"
        try:
            with path.open("rb") as raw:
                metadata = read_metadata(raw, path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); is {directory} a complete torch_dist checkpoint?"
            ) from None
        with blame(path):
            self.tensors = self._parse(metadata, path)
        for part in sorted({c.file for t in self.tensors.values() for c in t.chunks}):
            if data and not is_inside(part, directory):
                raise CheckpointError(f"{part} is missing, or a link out of the checkpoint; copy the checkpoint again")

    def _parse(self, metadata: Metadata, path: Path) -> dict[str, _Chunks]:
        tensors: dict[str, _Chunks] = {}
        places: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {
            (index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()
        }
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata) or is_state(name):
                continue
            spec = TensorSpec(item.properties.dtype, tuple(item.size))
            if not isinstance(spec.dtype, torch.dtype) or any(n < 0 for n in spec.shape):
                raise CheckpointError(f"{path} gives {name} dtype {spec.dtype} and shape {list(spec.shape)}")
            chunks = []
            for chunk in item.chunks:
                info = places.get((name, tuple(chunk.offsets)))
                if info is None:
                    raise CheckpointError(f"{path} does not say where {name} at {list(chunk.offsets)} is stored")
                if info.transform_descriptors:
                    raise CheckpointError(
                        f"{name} is stored with {info.transform_descriptors[0]}, which is not supported"
                    )
                file = self.directory / plain_name(info.relative_path, path)
                chunks.append(_Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, info.offset, info.length))
            tensors[name] = _Chunks(name, spec, chunks)
        return tensors

    @property
    def names(self) -> Collection[str]:
        return self.tensors

    @property
    def files(self) -> Sequence[Path]:
        return [self.directory / ".metadata", *self.directory.glob("*.distcp")]

    def spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        """Bytes [start, stop) of the row-major global tensor."""
        tensor = self.tensors[name]
        width = tensor.spec.dtype.itemsize
        for chunk, inside, count in tensor.runs(start // width, stop // width):
            record = chunk.file, chunk.offset
            if record not in self._starts:
                nbytes = math.prod(chunk.sizes) * width
                self._starts[record] = data_offset(chunk.file, chunk.offset, chunk.length, nbytes)
            data = self._starts[record]
            yield Extent(chunk.file, data + inside * width, count * width)


# ---- writing ----


@dataclass
class DistPlan:
    """A torch_dist checkpoint to be written: files with their sizes, the place of every entry's data."""

    sizes: dict[str, int] = field(default_factory=dict)
    data: dict[tuple[str, int | None], tuple[str, int]] = field(default_factory=dict)
    records: list[tuple[str, int, TensorSpec]] = field(default_factory=list)
    keys: dict[str, TensorSpec] = field(default_factory=dict)
    storage: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    chunks: dict[str, list[ChunkStorageMetadata]] = field(default_factory=dict)

    def add(
        self, place: tuple[str, int | None], key: str, index: tuple[int, ...], chunk: TensorSpec, file: str
    ) -> None:
        """Put one chunk, the part of `key` at `index`, behind what `file` holds so far."""
        start, record = self.sizes.get(file, 0), record_of(chunk)
        self.records.append((file, start, chunk))
        self.data[place] = (file, start + record.data_offset)
        self.sizes[file] = start + record.length
        corner = torch.Size((*index, *(0 for _ in range(len(chunk.shape) - len(index)))))
        chunks = self.chunks.setdefault(key, [])
        self.storage[MetadataIndex(key, corner, len(chunks))] = _StorageInfo(file, start, record.length)
        chunks.append(ChunkStorageMetadata(corner, torch.Size(chunk.shape)))

    @cached_property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for _, _, spec in self.records)


def plan_plain(specs: Mapping[str, TensorSpec]) -> DistPlan:
    """Place whole tensors under their own names in one file."""
    plan = DistPlan()
    for name, spec in specs.items():
        plan.keys[name] = spec
        plan.add((name, None), name, (), spec, "__0_0.distcp")
    return plan


def create_checkpoint(directory: Path, plan: DistPlan) -> None:
    """A checkpoint of one iteration, with its files as create_files makes them."""
    (directory / ITERATION).mkdir(parents=True)
    create_files(directory / ITERATION, plan)


def publish_checkpoint(directory: Path, plan: DistPlan, args: Mapping[str, object]) -> None:
    """Make it a valid one, see write_metadata; the tracker comes last."""
    write_metadata(directory / ITERATION, plan, args, iteration=1)
    write_text_atomic(directory / TRACKER, "1")


def create_files(directory: Path, plan: DistPlan) -> None:
    """Make the data files at their final size with everything but the tensor data, which is written in place later."""
    by_file = itertools.groupby(sorted(plan.records, key=lambda r: (r[0], r[1])), key=lambda r: r[0])
    for name, records in by_file:
        with (directory / name).open("wb") as file:
            for _, start, spec in records:
                for position, data in record_of(spec).written:
                    file.seek(start + position)
                    file.write(data)
            file.truncate(plan.sizes[name])


def write_metadata(directory: Path, plan: DistPlan, args: Mapping[str, object], iteration: int) -> None:
    """Write .metadata, common.pt and metadata.json of an iteration, last of all.

    args: plain values that Megatron-LM reads as the checkpoint's arguments.
    """
    metadata = Metadata(
        state_dict_metadata={
            key: TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), plan.chunks[key])
            for key, spec in plan.keys.items()
        },
        planner_data={},
        storage_data=plan.storage,
        version="1.0.0",
    )
    common = io.BytesIO()
    torch.save(common_state(args, iteration), common)
    write_bytes_atomic(directory / "common.pt", common.getvalue())
    write_text_atomic(directory / "metadata.json", json.dumps(SHARDED_BACKEND))
    write_bytes_atomic(directory / ".metadata", pickle.dumps(metadata))


def common_state(args: Mapping[str, object], iteration: int) -> Json:
    """What Megatron-LM expects in common.pt.

    Megatron-LM reads `args` by attribute; an OrderedDict with the same attributes serves that and still loads with
    `weights_only=True` everywhere, which a Namespace does not.
    """
    values = OrderedDict(args)
    vars(values).update(args)
    return {"args": values, "checkpoint_version": 3.0, "iteration": iteration}


def load_common(directory: Path) -> Json:
    """Read common.pt without running code from it. Raises: CheckpointError naming it."""
    path = directory / "common.pt"
    try:
        with torch.serialization.safe_globals([Namespace]):  # Megatron-LM's own checkpoints
            state = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged archive or pickle fails in any way there is
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint's state; copy it again")
    return state
