"""Conversion plans: everything that is decided before the first weight is read. Headers only, no model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.files import main_dtype
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import blame, format_bytes, read_json
from swiftlite.utils.text import printable
from swiftlite.weights import stream
from swiftlite.weights.dcp_file import DistPlan, TorchDistSource
from swiftlite.weights.fp8 import ACTIVATION_SCALES, SCALES, open_source
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import BoundMap, Coverage, Duplicate, Entry
from swiftlite.weights.safetensors import INDEX, SINGLE, Located, SafetensorsSource
from swiftlite.weights.storage import Extent, Files, TensorSource, TensorSpec, decoder, place_of
from swiftlite.weights.torch_dist import HfNames, McoreView, plan_torch_dist

# ---- Hugging Face -> Megatron ----


@dataclass(frozen=True)
class ToMcorePlan:
    """Everything about a conversion before the first weight is read."""

    source: SafetensorsSource
    bound: BoundMap
    coverage: Coverage
    dist: DistPlan
    dtypes: Mapping[tuple[str, int | None], torch.dtype]

    @property
    def main_dtype(self) -> torch.dtype:
        """dtype of most of the weights, which config.json is to name."""
        return main_dtype((self.dtypes[e.mcore, e.expert], math.prod(e.shape)) for e in self.bound.entries)

    def jobs(self, directory: Path) -> list[stream.Job]:
        """In the order of the source files, so that reading is sequential."""
        tensors, decode = self.source.tensors, decoder(self.source)
        jobs = []
        for entry in self.bound.entries:
            file, offset = self.dist.data[entry.mcore, entry.expert]
            jobs.append(
                stream.Job(
                    entry.label, entry.hf, entry.segments, entry.row_size, _locate(self.source, entry.hf),
                    tuple(tensors[n].spec.dtype for n in entry.hf), self.dtypes[entry.mcore, entry.expert],
                    directory / file, offset, decode,
                )
            )  # fmt: skip
        first = {entry.label: tensors[entry.hf[0]] for entry in self.bound.entries}
        return sorted(jobs, key=lambda job: (first[job.name].file.name, first[job.name].offset))


class ConfigSource(SafetensorsSource):
    """The tensors that config.json and the index speak of, for planning where the weights themselves are not there."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Without an index: all tensors that the config describes, MTP blocks too. Nothing can be read."""
        self.directory = directory
        bound = bind_map(config, self._index or ("mtp.",))
        shapes = {name: entry.hf_shapes[i] for name, (entry, i) in bound.by_hf.items()}
        kept = {name for name, (entry, _) in bound.by_hf.items() if entry.rule.keep_dtype}
        for copy in bound.duplicates:
            if copy.name in self._index:
                shapes[copy.name] = shapes[resolve_copy(copy, bound)]
        dtype = getattr(torch, str(config.get("torch_dtype") or config.get("dtype") or "bfloat16"))
        # Names that no rule knows are reported by BoundMap.check; scales of FP8 weights go when these are dequantised.
        unknown = {n: () for n in self._index if n not in shapes and not n.endswith((*SCALES, *ACTIVATION_SCALES))}
        self.tensors = {
            name: Located(TensorSpec(torch.float32 if name in kept else dtype, shape), self._file(name), 0)
            for name, shape in {**shapes, **unknown}.items()
            if not self._index or name in self._index
        }

    def _file(self, name: str) -> Path:
        return self.directory / self._index.get(name, SINGLE)

    @property
    def stored_bytes(self) -> int:
        """What the index says, or the sum of the tensors."""
        path = self.directory / INDEX
        with blame(path):
            stated = (read_json(path).get("metadata") or {}).get("total_size") if path.is_file() else None
            return int(stated or sum(located.spec.nbytes for located in self.tensors.values()))


def has_weights(directory: Path) -> bool:
    return any(directory.glob("*.safetensors"))


def plan_to_mcore(
    model_dir: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    num_files: int | None = None,
    num_processes: int = 1,
    source: SafetensorsSource | None = None,
) -> ToMcorePlan:
    """Read headers, hold them against config.json and lay out the checkpoint.

    Args: dtype: converts to this while streaming; None keeps what is stored. num_files: default, see default_num_files.
    Raises: CheckpointError, MapError, ShapeError or ConfigError naming the first thing that is wrong.
    """
    source = source or open_source(model_dir, config)
    bound = bind_map(config, source.tensors)
    coverage = bound.check({name: t.spec.shape for name, t in source.tensors.items()}, str(model_dir))
    coverage = replace(coverage, ignored=(*coverage.ignored, *getattr(source, "left_out", ())))
    dtypes = {(e.mcore, e.expert): _target_dtype(source, e, dtype) for e in bound.entries}
    specs = [(e, dtypes[e.mcore, e.expert]) for e in bound.entries]
    total = sum(TensorSpec(d, e.shape).nbytes for e, d in specs)
    dist = plan_torch_dist(specs, num_files or max(default_num_files(total), num_processes))
    return ToMcorePlan(source, bound, coverage, dist, dtypes)


def default_num_files(total_bytes: int) -> int:
    """About 10 GB each and at least 2, as ms-swift's thread_count."""
    return max(-(-(total_bytes // 10**9) // 10), 2)


def _target_dtype(source: SafetensorsSource, entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    stored = {source.value_dtype(name) for name in entry.hf}
    if dtype is not None and not entry.rule.keep_dtype:
        return dtype
    if len(stored) > 1:
        raise CheckpointError(
            f"{' and '.join(entry.hf)} have different dtypes, but Megatron keeps them in one tensor; "
            "convert to one dtype with --torch_dtype bfloat16"
        )
    return stored.pop()


def _locate(source: TensorSource, names: Sequence[str]) -> stream.Locate:
    def locate(index: int, start: int, stop: int) -> Iterator[Extent]:
        return source.extents(names[index], start, stop)

    return locate


# ---- Megatron -> Hugging Face ----


@dataclass(frozen=True)
class ToHfPlan:
    """Everything about a conversion back before the first weight is read. `specs`: output tensors in file order."""

    view: McoreView
    specs: Mapping[str, TensorSpec]
    copies: Mapping[str, str]
    layout: Mapping[str, str] | None

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def jobs(self, places: Mapping[str, tuple[Path, int]]) -> list[stream.Job]:
        """places: tensor -> (file, offset of its data). In the order of the source, so that reading is sequential."""
        source = HfNames(self.view)
        keyed = []
        for name, spec in self.specs.items():
            origin = self.copies.get(name, name)
            keyed.append((place_of(source, origin), copy_job(source, origin, *places[name], spec.dtype)))
        return [job for _, job in sorted(keyed, key=lambda item: item[0])]


def copy_job(source: TensorSource, name: str, file: Path, offset: int, dtype: torch.dtype) -> stream.Job:
    """Copy one tensor as it is, but for its dtype."""
    spec = source.spec(name)
    num_rows = spec.shape[0] if spec.shape else 1
    row_size = spec.numel // max(num_rows, 1)
    rows = (Segment(0, 0, num_rows),) if spec.numel else ()
    locate = _locate(source, (name,))
    return stream.Job(name, (name,), rows, row_size, locate, (spec.dtype,), dtype, file, offset, decoder(source))


def plan_to_hf(
    iteration: Path,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    manifest: Mapping[str, Any] | None = None,
    data: bool = True,
) -> ToHfPlan:
    """Read metadata, hold it against config.json and decide names, dtypes and order of the output.

    Args: dtype: converts to this while streaming; None keeps what the checkpoint holds. manifest: of the checkpoint
        that this one was made from; gives order, files, stored copies and dtypes of tensors that have their own. data:
        as TorchDistSource.
    """
    source = TorchDistSource(iteration, data)
    bound = bind_map(config, source.tensors)
    view = McoreView.open(source, bound)
    original = (manifest or {}).get("tensors", {})
    copies = {d.name: resolve_copy(d, bound) for d in bound.duplicates if d.name in original}
    names = [n for n in original if n in bound.by_hf or n in copies]
    if set(names) != set(bound.by_hf) | set(copies):
        names = [*bound.by_hf, *copies]
    specs = {}
    for name in names:
        entry, position = bound.by_hf[copies.get(name, name)]
        stored = view.spec(entry).dtype
        if entry.rule.keep_dtype:
            target = getattr(torch, original[name]["dtype"]) if name in original else stored
        else:
            target = dtype or stored
        specs[name] = TensorSpec(target, entry.hf_shapes[position])
    layout = {name: original[name]["file"] for name in names} if set(names) <= set(original) else None
    return ToHfPlan(view, specs, copies, layout)


def resolve_copy(duplicate: Duplicate, bound: BoundMap) -> str:
    """The tensor that holds the bytes of a stored copy; a tied model's head is its embedding."""
    return duplicate.of if duplicate.of in bound.by_hf else "model.embed_tokens.weight"


# ---- shared ----


def check_duplicates(source: SafetensorsSource, duplicates: Iterable[Duplicate]) -> None:
    """Raises: CheckpointError if a stored copy differs from its original; Megatron can hold only one of them."""
    with Files() as files:
        for duplicate in duplicates:
            of = duplicate.of if duplicate.of in source.tensors else "model.embed_tokens.weight"
            size = source.spec(of).nbytes
            if source.spec(duplicate.name) == source.spec(of):
                for start in range(0, size, stream.BLOCK_BYTES):
                    stop = min(start + stream.BLOCK_BYTES, size)
                    if _read(source, duplicate.name, start, stop, files) != _read(source, of, start, stop, files):
                        break
                else:
                    continue
            raise CheckpointError(
                f"{duplicate.name} is stored but differs from {of}, though config.json makes them one; "
                "set tie_word_embeddings to false if the model has a head of its own"
            )


def _read(source: SafetensorsSource, name: str, start: int, stop: int, files: Files) -> bytearray:
    data = bytearray(stop - start)
    position = 0
    for extent in source.extents(name, start, stop):
        files.read_into(extent, memoryview(data)[position : position + extent.size])
        position += extent.size
    return data


def print_coverage(bound: BoundMap, coverage: Coverage, dtypes: Mapping[tuple[str, int | None], torch.dtype]) -> None:
    """Print the plan per rule: Megatron name <- HF names, shape, dtype, bytes; then what is left out and why."""
    for entry in bound.entries:
        if entry.expert:
            continue
        dtype, experts = dtypes[entry.mcore, entry.expert], 1 if entry.expert is None else bound.model.experts
        spec = TensorSpec(dtype, entry.shape)
        print(
            f"{entry.label} <- {' + '.join(entry.hf)} {type(entry.rule.op).__name__} "
            f"{list(entry.shape)} {str(dtype).removeprefix('torch.')} {format_bytes(spec.nbytes)}"
            f"{f', and so {experts - 1} more experts' if experts > 1 else ''}"
        )
    for name in coverage.ignored:
        print(printable(f"ignored: {name} (not a weight)"))
    for duplicate in coverage.duplicates:
        print(printable(f"left out: {duplicate.name} (copy of {duplicate.of})"))
