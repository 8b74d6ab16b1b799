"""An adapter changes its format. What a plan has: see conversion.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from swiftlite.checkpoint.adapter import ADAPTER_WEIGHTS, Adapter
from swiftlite.convert.hf import copy_job
from swiftlite.utils.logger import warn_once
from swiftlite.weights import stream
from swiftlite.weights.dcp_file import (
    ITERATION,
    DistPlan,
    TorchDistSource,
    create_checkpoint,
    plan_plain,
    publish_checkpoint,
)
from swiftlite.weights.lora import EXPERT
from swiftlite.weights.safetensors import SafetensorsSource, ShardPlan, create_shards, plan_shards
from swiftlite.weights.storage import Renamed, TensorSpec, WeightSource

MLP = ("gate_proj", "up_proj", "down_proj")


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
        return plan_plain(self.specs)

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
            create_checkpoint(directory, self.dist)
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
            publish_checkpoint(directory, self.dist, {})
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
