"""Megatron's `torch_dist` checkpoints (torch.distributed.checkpoint files) without a model or a process group.

A checkpoint holds global tensors: parallel sizes are absent, layers of a homogeneous model are stacked in a leading
[L], experts in a leading [E]. Each chunk of a tensor is one `torch.save` record, a zip archive whose data part is plain
bytes; reading and writing therefore go by byte position, and a part of a chunk costs only its own bytes.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from swiftlite.utils.directories import TRACKER as TRACKER
from swiftlite.utils.directories import Directory, what_it_is
from swiftlite.utils.errors import CheckpointError, MapError, ShapeError, reason
from swiftlite.utils.io import blame, is_inside, plain_name, write_bytes_atomic, write_text_atomic
from swiftlite.weights.ops import Segment, Shape
from swiftlite.weights.rule import BoundMap, Entry, clip
from swiftlite.weights.storage import Extent, TensorSpec
from swiftlite.weights.unpickle import BoundedUnpickler, read_metadata

SHARDED_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Not model weights: skipped by name when a training checkpoint is read.
STATE_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler")
STATE_PARTS = ("_extra_state",)
# Names that other specs and versions write for the same tensor; the canonical name is the Transformer Engine spec's.
OTHER_NAMES = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)


# ---- where a tensor of the map sits on disk ----


@dataclass(frozen=True)
class Slot:
    """`key[index]` holds an entry; `lead` are the sizes of the leading dimensions that `index` runs over."""

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


def slot_of(entry: Entry, stacked: bool | None = None) -> Slot:
    """Where Megatron saves an entry. stacked: layers in one tensor; default: as Megatron does for this model."""
    model = entry.model
    if stacked is None:
        stacked = model.homogeneous
    index: tuple[int, ...] = () if entry.expert is None else (entry.expert,)
    lead: tuple[int, ...] = () if entry.expert is None else (model.experts,)
    if entry.stack == "decoder.layers" and stacked:
        assert entry.index is not None
        return Slot(f"{entry.stack}.{entry.name}", (entry.index, *index), (model.num_layers, *lead))
    return Slot(entry.mcore, index, lead)


def candidates(entry: Entry) -> Iterator[Slot]:
    """Every place where some Megatron version or spec keeps this entry, the usual one first."""
    for stacked in (entry.model.homogeneous, not entry.model.homogeneous):
        slot = slot_of(entry, stacked)
        yield slot
        for ours, theirs in OTHER_NAMES:
            if ours in slot.key:
                yield Slot(slot.key.replace(ours, theirs), slot.index, slot.lead)
        if ".transformer_layer." in slot.key:
            yield Slot(slot.key.replace(".transformer_layer.", ".mtp_model_layer."), slot.index, slot.lead)


# ---- reading ----


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
        self.name, self.spec, self.chunks = name, spec, chunks
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


class TorchDistSource:
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

    def _parse(self, metadata: Any, path: Path) -> dict[str, _Chunks]:
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
                self._starts[record] = _data_offset(chunk.file, chunk.offset, chunk.length, nbytes)
            data = self._starts[record]
            yield Extent(chunk.file, data + inside * width, count * width)


def _data_offset(file: Path, offset: int, length: int, nbytes: int) -> int:
    """Absolute position of a record's tensor data. Raises: CheckpointError if the record is not one plain tensor."""
    try:
        with file.open("rb") as raw, zipfile.ZipFile(_Window(raw, offset, length)) as archive:
            names = {name.partition("/")[2]: name for name in archive.namelist()}
            if nbytes == 0:
                return offset
            (info,) = (archive.getinfo(name) for part, name in names.items() if re.fullmatch(r"data/\d+", part))
            with archive.open(names["data.pkl"]) as described:
                start = _start_bytes(described.read(_MAX_DESCRIPTION), nbytes)
            if not 0 <= start <= info.file_size - nbytes or info.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{file}: record at {offset} holds {info.file_size} bytes where the metadata says {start + nbytes}"
                )
            raw.seek(offset + info.header_offset)
            header = raw.read(30)
            return (
                offset + info.header_offset + 30 + start
                + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            )  # fmt: skip
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in any way there is
        raise CheckpointError(f"{file}: the record at byte {offset} is damaged or truncated ({error})") from None


_MAX_DESCRIPTION = 1 << 16  # of one plain tensor; torch.save writes some hundred bytes


class _TensorPickle(BoundedUnpickler):
    """Reads where in its storage a saved tensor starts, from the pickle of a `torch.save` record; runs none of it."""

    def find_class(self, module: str, name: str) -> Any:
        return lambda *args: args

    def persistent_load(self, pid: Any) -> Any:
        return pid


@lru_cache(maxsize=1024)  # by content: the experts of a model all have the same
def _start_bytes(description: bytes, nbytes: int) -> int:
    """Raises: ValueError if `description` is not that of a contiguous tensor of `nbytes` bytes."""
    _, first, size, stride, *_ = _TensorPickle(io.BytesIO(description)).load()
    numel = math.prod(size)
    expected = [math.prod(size[d + 1 :]) for d in range(len(size))]
    if any(s != e and n > 1 for s, e, n in zip(stride, expected, size, strict=True)) or nbytes % max(numel, 1):
        raise ValueError("not a contiguous tensor of the expected size")
    return int(first) * (nbytes // max(int(numel), 1))


class _Window(io.RawIOBase):
    """A part of a file, as a file of its own."""

    def __init__(self, raw: Any, start: int, length: int) -> None:
        self._raw, self._start, self._length, self._at = raw, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._raw.seek(self._start + self._at)
        data: bytes = self._raw.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


def is_state(name: str) -> bool:
    """True for optimizer, rng and other entries that are not model weights."""
    return name.startswith(STATE_PREFIXES) or any(part in name for part in STATE_PARTS)


@dataclass(frozen=True)
class McoreView:
    """A torch_dist checkpoint seen through a bound map: entries by canonical name, wherever it keeps them."""

    source: TorchDistSource
    bound: BoundMap
    slots: Mapping[tuple[str, int | None], Slot]

    @classmethod
    def open(cls, source: TorchDistSource, bound: BoundMap) -> McoreView:
        """Find every entry. Raises: MapError naming missing and unknown tensors, ShapeError for the first wrong shape.

        A vocabulary may be padded in the file: more rows than the model has are allowed for the first dimension of the
        embedding and the output layer.
        """
        slots: dict[tuple[str, int | None], Slot] = {}
        missing = []
        for entry in bound.entries:
            slot = next((s for s in candidates(entry) if s.key in source.tensors), None)
            if slot is None:
                missing.append(entry.label)
                continue
            stored, wanted = source.spec(slot.key).shape, (*slot.lead, *entry.shape)
            padded_ok = "vocab" in entry.rule.hf[0].dims and stored[1:] == wanted[1:] and stored[0] >= wanted[0]
            if stored != wanted and not padded_ok:
                raise ShapeError(
                    f"{slot.key} in {source.directory} has shape {list(stored)}, but config.json makes it "
                    f"{list(wanted)}"
                )
            slots[entry.mcore, entry.expert] = slot
        unknown = sorted(set(source.tensors) - {s.key for s in slots.values()})
        if bound.model.tied:  # split over pipeline stages it keeps a second copy of the embedding
            unknown = [name for name in unknown if name != "output_layer.weight"]
        if missing or unknown:
            parts = [
                f"{len(n)} {what} tensors, first {n[0]}"
                for what, n in (("missing", missing), ("unknown", unknown))
                if n
            ]
            raise MapError(
                f"{source.directory} does not match the model's config.json: {'; '.join(parts)}. "
                "Check that the checkpoint is complete and belongs to this model"
            )
        return cls(source, bound, slots)

    def spec(self, entry: Entry) -> TensorSpec:
        """Type and shape of an entry, without leading dimensions."""
        slot = self.slots[entry.mcore, entry.expert]
        return TensorSpec(self.source.spec(slot.key).dtype, entry.shape)

    def extents(self, entry: Entry, start: int, stop: int) -> Iterator[Extent]:
        """Bytes [start, stop) of the entry's own row-major tensor."""
        slot = self.slots[entry.mcore, entry.expert]
        position = 0
        for value, size in zip(slot.index, slot.lead, strict=True):
            position = position * size + value
        base = position * self.spec(entry).nbytes
        yield from self.source.extents(slot.key, base + start, base + stop)


class HfNames:
    """The same checkpoint as Hugging Face tensors: a TensorSource that finds their bytes through the inverse gather."""

    def __init__(self, view: McoreView) -> None:
        self.view = view
        self._inverse = lru_cache(maxsize=64)(lambda name: tuple(self._rows(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.view.bound.by_hf)

    def spec(self, name: str) -> TensorSpec:
        entry, position = self.view.bound.by_hf[name]
        return TensorSpec(self.view.spec(entry).dtype, entry.hf_shapes[position])

    def _rows(self, name: str) -> Sequence[Segment]:
        entry, position = self.view.bound.by_hf[name]
        return entry.inverse(position)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        entry, _ = self.view.bound.by_hf[name]
        width = entry.row_size * self.spec(name).dtype.itemsize
        if start == stop:
            return
        skip, left = start % width, stop - start
        for segment in clip(self._inverse(name), start // width, -(-stop // width)):
            first = segment.start * width + skip
            size = min(segment.size * width - skip, left)
            yield from self.view.extents(entry, first, first + size)
            skip, left = 0, left - size


def find_iteration(directory: Path) -> Path:
    """The `iter_*` directory of the newest complete checkpoint. Accepts the checkpoint root or the directory itself.

    Raises: CheckpointError saying what the directory is instead.
    """
    if (directory / ".metadata").is_file():
        return directory
    tracker = directory / TRACKER
    if tracker.is_file():
        with tracker.open("rb") as file:
            text = file.read(100).decode("ascii", "replace").strip()
        name = text if text == "release" else f"iter_{int(text):07d}" if text.isdigit() else None
        if name is None:
            raise CheckpointError(f"{tracker} holds {text!r}, which is no iteration number")
        if not (directory / name / ".metadata").is_file():
            raise CheckpointError(f"{tracker} names iteration {text}, but {directory / name}/.metadata is not there")
        return directory / name
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist; give the directory of a Megatron checkpoint")
    newest = Directory(directory).iteration
    if newest is not None:
        raise CheckpointError(f"{directory}: its {TRACKER} is missing; name the checkpoint itself, {newest}")
    text, advice = what_it_is(directory)
    raise CheckpointError(f"{directory}: no Megatron checkpoint, this {text}; {advice}")


# ---- writing ----


@dataclass(frozen=True)
class _Frame:
    """A `torch.save` record without its tensor data: pieces of bytes by position, the gap for the data, the length."""

    pieces: tuple[tuple[int, bytes], ...]
    data_offset: int
    length: int


class _Sparse(io.RawIOBase):
    """Collects what torch.save writes, leaving out what it seeks over."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, bytes]] = []
        self._at = self.end = 0

    def write(self, data: Any) -> int:
        data = bytes(data)
        self.pieces.append((self._at, data))
        self._at += len(data)
        self.end = max(self.end, self._at)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.end)[whence]
        return self._at

    def tell(self) -> int:
        return self._at


@lru_cache(maxsize=4096)
def _frame(spec: TensorSpec) -> _Frame:
    """What `torch.save` writes around a tensor of this type and shape."""
    sparse = _Sparse()
    with torch.serialization.skip_data():
        torch.save(torch.empty(spec.shape, dtype=spec.dtype), sparse)  # type: ignore[arg-type]
    merged: list[tuple[int, bytes]] = []
    for position, data in sorted(sparse.pieces):
        if merged and merged[-1][0] + len(merged[-1][1]) == position:
            merged[-1] = (merged[-1][0], merged[-1][1] + data)
        else:
            merged.append((position, data))
    gap = merged[0][0] + len(merged[0][1]) if spec.nbytes else 0
    assert not spec.nbytes or (len(merged) == 2 and merged[1][0] - gap == spec.nbytes), "unexpected torch.save layout"
    return _Frame(tuple(merged), gap, sparse.end)


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
        start, frame = self.sizes.get(file, 0), _frame(chunk)
        self.records.append((file, start, chunk))
        self.data[place] = (file, start + frame.data_offset)
        self.sizes[file] = start + frame.length
        corner = torch.Size((*index, *(0 for _ in range(len(chunk.shape) - len(index)))))
        chunks = self.chunks.setdefault(key, [])
        self.storage[MetadataIndex(key, corner, len(chunks))] = _StorageInfo(file, start, frame.length)
        chunks.append(ChunkStorageMetadata(corner, torch.Size(chunk.shape)))

    @cached_property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for _, _, spec in self.records)


def plan_torch_dist(specs: Iterable[tuple[Entry, torch.dtype]], num_files: int) -> DistPlan:
    """Place one chunk per layer and expert, in order, over files of about equal size.

    Raises: ShapeError where tensors that Megatron stacks into one have different dtypes.
    """
    items = list(specs)
    total = sum(math.prod(entry.shape) * dtype.itemsize for entry, dtype in items)
    plan, written = DistPlan(), 0
    for entry, dtype in items:
        slot = slot_of(entry)
        whole = TensorSpec(dtype, (*slot.lead, *entry.shape))
        if plan.keys.setdefault(slot.key, whole).dtype != dtype:
            raise ShapeError(
                f"{entry.label} is {dtype}, other parts of {slot.key} are {plan.keys[slot.key].dtype}; Megatron keeps "
                "them in one tensor. Convert to one dtype with --torch_dtype bfloat16"
            )
        chunk = TensorSpec(dtype, ((1,) * len(slot.lead)) + entry.shape)
        file = f"__0_{min(written * num_files // max(total, 1), num_files - 1)}.distcp"
        plan.add((entry.mcore, entry.expert), slot.key, slot.index, chunk, file)
        written += chunk.nbytes
    return plan


def plan_plain(specs: Mapping[str, TensorSpec]) -> DistPlan:
    """Place whole tensors under their own names in one file."""
    plan = DistPlan()
    for name, spec in specs.items():
        plan.keys[name] = spec
        plan.add((name, None), name, (), spec, "__0_0.distcp")
    return plan


def create_files(directory: Path, plan: DistPlan) -> None:
    """Make the data files at their final size with everything but the tensor data, which is written in place later."""
    by_file = itertools.groupby(sorted(plan.records, key=lambda r: (r[0], r[1])), key=lambda r: r[0])
    for name, records in by_file:
        with (directory / name).open("wb") as file:
            for _, start, spec in records:
                for position, data in _frame(spec).pieces:
                    file.seek(start + position)
                    file.write(data)
            file.truncate(plan.sizes[name])


def write_metadata(directory: Path, plan: DistPlan, args: Mapping[str, Any], iteration: int) -> None:
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


def common_state(args: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """What Megatron-LM expects in common.pt.

    Megatron-LM reads `args` by attribute; an OrderedDict with the same attributes serves that and still loads with
    `weights_only=True` everywhere, which a Namespace does not.
    """
    values = OrderedDict(args)
    vars(values).update(args)
    return {"args": values, "checkpoint_version": 3.0, "iteration": iteration}


def load_common(directory: Path) -> dict[str, Any]:
    """Read common.pt without running code from it. Raises: CheckpointError naming it."""
    path = directory / "common.pt"
    try:
        with torch.serialization.safe_globals([Namespace]):  # Megatron-LM's own checkpoints
            state = torch.load(path, weights_only=True)
    except Exception as error:  # a damaged archive or pickle fails in any way there is
        raise CheckpointError(f"{path} cannot be read ({reason(error)}); copy it again") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, no checkpoint's state; copy it again")
    return state
