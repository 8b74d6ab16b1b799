"""What a checkpoint can become: a Hugging Face directory, a Megatron checkpoint, a PEFT adapter.

A target lays the output out before the first weight is read (`plan`). The plan has a kind (what is written), options
(what the output depends on besides the source), sizes of files and total_bytes, and
    prepare(directory)  makes the files, at their final size
    jobs(directory)     what is copied there, in the order of the source's files, so that reading is sequential
    publish(directory, hashes)  writes what belongs to the weights; hashes of all tensors; on rank 0, after the jobs
    written(directory)  what was written, under the names of the jobs' sources
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from swiftlite.checkpoint.bind import architecture_of, convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.files import main_dtype
from swiftlite.checkpoint.side_files import write_hashes, write_megatron_lm_args
from swiftlite.families import family_of
from swiftlite.utils.directories import CARRIED, TRACKER
from swiftlite.utils.dist import num_processes
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import write_text_atomic
from swiftlite.utils.logger import warn_once
from swiftlite.weights import dcp_file, stream
from swiftlite.weights.dcp_file import DistPlan, TorchDistSource
from swiftlite.weights.lora import EXPERT
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import Entry
from swiftlite.weights.safetensors import SafetensorsSource, ShardPlan, create_shards, plan_shards, write_index
from swiftlite.weights.storage import Beside, Renamed, TensorSpec, WeightSource, place_of
from swiftlite.weights.torch_dist import HfNames, McoreView, plan_torch_dist

ITERATION = "iter_0000001"
SHARD_BYTES = 5 * 10**9  # of a safetensors file, at most, where nothing else is asked for
MLP = ("gate_proj", "up_proj", "down_proj")


Source = TypeVar("Source", Checkpoint, Adapter, contravariant=True)


class Target(Protocol[Source]):
    def plan(self, source: Source) -> Plan:
        """Raises: CheckpointError, MapError, ShapeError or ConfigError naming what cannot be written so."""


# ---- Hugging Face ----


@dataclass(frozen=True)
class HfTarget:
    """A model directory. dtype: converts to this; None keeps what is stored. max_shard_bytes: of a file; None: as the
    files of the original were, where they are known."""

    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None

    def plan(self, source: Checkpoint) -> HfPlan:
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
        self.source.write_side_files(directory, main_dtype((s.dtype, s.numel) for s in self.specs.values()))
        write_index(directory, self.shards, self.total_bytes)

    def written(self, directory: Path) -> WeightSource:
        return SafetensorsSource(directory)


def places_in(directory: Path, shards: Sequence[ShardPlan]) -> dict[str, tuple[Path, int]]:
    """tensor -> (file, offset of its data)."""
    return {name: (directory / shard.file, offset) for shard in shards for name, offset in shard.offsets.items()}


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


# ---- Megatron ----


@dataclass(frozen=True)
class McoreTarget:
    """A torch_dist checkpoint. dtype: converts to this; None keeps what is stored. num_files: default, see
    default_num_files. trained_in: dtype that the arguments for Megatron-LM name; default: that of most weights."""

    dtype: torch.dtype | None = None
    num_files: int | None = None
    trained_in: torch.dtype | None = None

    def plan(self, source: Checkpoint | Adapter) -> McorePlan | AdapterPlan:
        if isinstance(source, Adapter):
            return AdapterPlan(source, to_mcore=True)
        family_of(architecture_of(source.config))  # says what to do where there is none
        groups = [[(entry, self._dtype(source, group)) for entry in group] for group in source.bound.groups]
        dtypes = {(e.mcore, e.expert): dtype for group in groups for e, dtype in group}
        total = sum(TensorSpec(dtype, e.shape).nbytes for group in groups for e, dtype in group)
        files = self.num_files or max(default_num_files(total), num_processes())
        options = ["to_mcore", str(self.dtype), files, source.changes, source.adapter is not None]
        return McorePlan(source, plan_torch_dist(groups, files), CarriedPlan(source), dtypes, options, self.trained_in)

    def _dtype(self, source: Checkpoint, group: Sequence[Entry]) -> torch.dtype:
        if self.dtype is not None and not group[0].rule.keep_dtype:
            return self.dtype
        names = dict.fromkeys(name for entry in group for name in entry.hf)
        stored = {source.source.value_dtype(name) for name in names}
        if len(stored) > 1:
            raise CheckpointError(
                f"{' and '.join(names)} have different dtypes, but Megatron keeps them in one tensor; "
                "convert to one dtype with --torch_dtype bfloat16"
            )
        return stored.pop()


def default_num_files(total_bytes: int) -> int:
    """About 10 GB each and at least 2, as ms-swift's thread_count."""
    return max(-(-(total_bytes // 10**9) // 10), 2)


@dataclass(frozen=True)
class CarriedPlan:
    """The files of tensors that belong to other parts than the text model, beside a Megatron checkpoint; none for a model
    that is all text."""

    source: Checkpoint

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        held, carried = self.source.source, self.source.carried
        return {n: TensorSpec(held.value_dtype(n), held.spec(n).shape) for n in self.source.names if n in carried}

    @cached_property
    def shards(self) -> Sequence[ShardPlan]:
        is_part = self.source.bound.naming is not None and self.source.whole
        return plan_shards(self.specs, SHARD_BYTES) if is_part else ()

    def prepare(self, directory: Path) -> None:
        if self.shards:
            (directory / CARRIED).mkdir()
            create_shards(directory / CARRIED, self.shards)
            write_index(directory / CARRIED, self.shards, sum(spec.nbytes for spec in self.specs.values()))

    def jobs(self, directory: Path) -> list[stream.Job]:
        return copy_jobs(self.source.source, self.specs, places_in(directory / CARRIED, self.shards), {})


@dataclass(frozen=True)
class McorePlan:
    """carried: see there. dtypes: (Megatron name, expert) -> dtype in the checkpoint."""

    kind = "Megatron checkpoint"
    source: Checkpoint
    dist: DistPlan
    carried: CarriedPlan
    dtypes: Mapping[tuple[str, int | None], torch.dtype]
    options: Sequence[object]
    trained_in: torch.dtype | None = None

    @property
    def sizes(self) -> Sequence[int]:
        return [*self.dist.sizes.values(), *(shard.size for shard in self.carried.shards)]

    @property
    def total_bytes(self) -> int:
        return self.dist.total_bytes + sum(spec.nbytes for spec in self.carried.specs.values())

    @cached_property
    def main_dtype(self) -> torch.dtype:
        """dtype of most of the weights, which config.json is to name."""
        entries = self.source.bound.entries
        return main_dtype((self.dtypes[e.mcore, e.expert], math.prod(e.shape)) for e in entries)

    @cached_property
    def arguments(self) -> MegatronArguments:
        return conversion_arguments(convert_hf_config(self.source.config), "", self.trained_in or self.main_dtype)

    def prepare(self, directory: Path) -> None:
        (directory / ITERATION).mkdir(parents=True)
        dcp_file.create_files(directory / ITERATION, self.dist)
        self.carried.prepare(directory)

    def jobs(self, directory: Path) -> list[stream.Job]:
        groups = self.source.bound.groups
        ordered = sorted(groups, key=lambda group: place_of(self.source.source, group[0].hf[0]))
        return [*self.carried.jobs(directory), *(self._job(group, directory / ITERATION) for group in ordered)]

    def _job(self, group: Sequence[Entry], directory: Path) -> stream.Job:
        """Write entries that share Hugging Face tensors, so that each of these is read once."""
        source, first = self.source.source, group[0]
        names = tuple(dict.fromkeys(name for entry in group for name in entry.hf))
        segments, places = [], []
        row = 0
        for entry in group:
            file, offset = self.dist.data[entry.mcore, entry.expert]
            places.append((row, directory / file, offset))
            for segment in entry.segments:
                segments.append(replace(segment, source=names.index(entry.hf[segment.source])))
                row += segment.size
        return stream.Job(
            first.label, names, tuple(segments), first.row_size, source, self.dtypes[first.mcore, first.expert],
            *places[0][1:], tuple(places[1:]),
        )  # fmt: skip

    def publish(self, directory: Path, hashes: Mapping[str, str]) -> None:
        self.source.write_side_files(directory, self.main_dtype)
        self.source.write_manifest(directory)
        write_hashes(directory, hashes)
        write_megatron_lm_args(directory, self.arguments.megatron_lm_args())
        dcp_file.write_metadata(directory / ITERATION, self.dist, self.arguments.checkpoint_args(), iteration=1)
        write_text_atomic(directory / TRACKER, "1")

    def written(self, directory: Path) -> WeightSource:
        written = HfNames(McoreView.open(TorchDistSource(directory / ITERATION), self.source.bound))
        return Beside(written, SafetensorsSource(directory / CARRIED)) if self.carried.shards else written


# ---- adapters ----


@dataclass(frozen=True)
class PeftTarget:
    """An adapter as PEFT has it."""

    def plan(self, source: Adapter) -> AdapterPlan:
        return AdapterPlan(source, to_mcore=False)


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter in either format, bit for bit, with its adapter_config.json."""

    source: Adapter
    to_mcore: bool

    @property
    def kind(self) -> str:
        return "Megatron adapter" if self.to_mcore else "PEFT adapter"

    @property
    def options(self) -> Sequence[object]:
        return ["adapter", self.to_mcore]

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: self.source.source.spec(name) for name in self.source.names}

    @cached_property
    def dist(self) -> DistPlan:
        return dcp_file.plan_plain(self.specs)

    @cached_property
    def shard(self) -> ShardPlan:
        return plan_shards({self.source.peft_name(name): spec for name, spec in self.specs.items()}, 1 << 62)[0]

    @property
    def sizes(self) -> Sequence[int]:
        return list(self.dist.sizes.values()) if self.to_mcore else [self.shard.size]

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def prepare(self, directory: Path) -> None:
        if self.to_mcore:
            (directory / ITERATION).mkdir(parents=True)
            dcp_file.create_files(directory / ITERATION, self.dist)
        else:
            create_shards(directory, [self.shard])
            (directory / self.shard.file).rename(directory / ADAPTER_WEIGHTS)

    def _place(self, directory: Path, name: str) -> tuple[Path, int]:
        if not self.to_mcore:
            return directory / ADAPTER_WEIGHTS, self.shard.offsets[self.source.peft_name(name)]
        file, offset = self.dist.data[name, None]
        return directory / ITERATION / file, offset

    def jobs(self, directory: Path) -> list[stream.Job]:
        source = self.source.source
        return [copy_job(source, n, *self._place(directory, n), spec.dtype) for n, spec in self.specs.items()]

    def publish(self, directory: Path, hashes: Mapping[str, str]) -> None:
        self.source.write_side_files(directory)
        if self.to_mcore:
            dcp_file.write_metadata(directory / ITERATION, self.dist, {}, iteration=1)
            write_text_atomic(directory / TRACKER, "1")
            return
        modules = self.source.ranks.keys()
        experts = {module for module in modules if EXPERT.search(module)}
        if experts and any(module.endswith(MLP) for module in modules - experts):
            warn_once(
                "the adapter has experts and other MLPs; peft on transformers 5 (seen with peft 0.21) leaves out the "
                "others without a word: merge it with --merge_lora true to use all of it there"
            )

    def written(self, directory: Path) -> WeightSource:
        if self.to_mcore:
            return TorchDistSource(directory / ITERATION)
        return Renamed(SafetensorsSource(directory), {n: self.source.peft_name(n) for n in self.specs})


Plan = HfPlan | McorePlan | AdapterPlan
