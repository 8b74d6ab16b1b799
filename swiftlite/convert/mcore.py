"""A checkpoint becomes a torch_dist checkpoint of Megatron. What a plan has: see conversion.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.files import main_dtype
from swiftlite.checkpoint.side_files import write_hashes, write_megatron_lm_args
from swiftlite.convert.hf import CarriedPlan
from swiftlite.convert.peft import AdapterPlan
from swiftlite.utils.dist import num_processes
from swiftlite.utils.errors import CheckpointError
from swiftlite.weights import stream
from swiftlite.weights.dcp_file import ITERATION, DistPlan, TorchDistSource, create_checkpoint, publish_checkpoint
from swiftlite.weights.rule import Entry
from swiftlite.weights.storage import Beside, TensorSpec, WeightSource, place_of
from swiftlite.weights.torch_dist import HfNames, McoreView, plan_torch_dist


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
        _ = source.family  # says what to do where there is none
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
        create_checkpoint(directory, self.dist)
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
        publish_checkpoint(directory, self.dist, self.arguments.checkpoint_args())

    def written(self, directory: Path) -> WeightSource:
        written = HfNames(McoreView.open(TorchDistSource(directory / ITERATION), self.source.bound))
        carried = self.carried.written(directory)
        return written if carried is None else Beside(written, carried)
