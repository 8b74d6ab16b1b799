"""Weights that are trained as a whole beside LoRA: what peft calls modules to save.

The live parameter itself is trained, so every layout treats it as in full training; `adapters` knows it under a second
name, by which checkpoints hold it. Without adapters a layer computes with the origin's weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.megatron.shards import LiveMap, iter_shards
from swiftlite.utils.errors import UsageError
from swiftlite.weights.rule import Entry
from swiftlite.weights.shard import read_shard
from swiftlite.weights.storage import Files, WeightSource


@dataclass(frozen=True)
class _Place:
    """Where a weight, or this rank's part of it, is in the model: `layer`.`attribute`, at `offset` of the entry."""

    layer: torch.nn.Module
    attribute: str
    entry: Entry
    offset: tuple[int, ...]
    shard: ShardedTensor

    @property
    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.layer, self.attribute)
        return found

    def read(self, source: WeightSource) -> Tensor:
        """This rank's part of what `source` has under the weight's Hugging Face name."""
        with Files() as files:
            shape, now = self.shard.local_shape, self.tensor
            return read_shard(source, self.entry, self.offset, shape, files, now.dtype).to(now.device)


class WholeWeights(torch.nn.Module):
    """Those of one model chunk on this rank: parameters, and the buffers of the same modules, which no step moves."""

    def __init__(self, model: MegatronModule, origin: Checkpoint, names: Collection[str]) -> None:
        """names: Hugging Face names, as `saved_weights` finds them. Raises: UsageError for what is a part of a tensor."""
        super().__init__()
        self.origin = origin
        self.places: dict[str, _Place] = {}
        self._originals: dict[str, torch.nn.Parameter] = {}
        owners = {
            id(tensor): (layer, attribute)
            for layer in model.modules()
            for attribute, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        }
        live = LiveMap(origin.bound)
        for shard in iter_shards([model]):
            entry, offset = live.entry(shard)
            if entry.hf[0] in names:
                if id(shard.data) not in owners:
                    raise UsageError(
                        f"--modules_to_save: {entry.hf[0]} is no parameter of its own on Megatron; leave it out"
                    )
                name = entry.hf[0].replace(".", "/")
                self.places[name] = _Place(*owners[id(shard.data)], entry, offset, _under(entry.hf[0], shard))
                if isinstance(shard.data, torch.nn.Parameter):
                    shard.data.requires_grad_()
                    self.register_parameter(name, shard.data)
                else:
                    self.register_buffer(name, shard.data)

    def load(self, source: WeightSource) -> None:
        """Take the values of another adapter."""
        with torch.no_grad():
            for place in self.places.values():
                place.tensor.copy_(place.read(source))

    def shards(self) -> dict[str, ShardedTensor]:
        """The weights as part of the adapter, see Lora.shards."""
        now = {name: place.tensor for name, place in self.places.items()}
        return {n: replace(place.shard, data=now[n], dtype=now[n].dtype) for n, place in self.places.items()}

    @contextmanager
    def originals(self) -> Iterator[None]:
        """The layers compute with the origin's weights inside the block."""
        trained: dict[str, Any] = dict(self.named_parameters())
        if not self._originals:
            read = {name: self.places[name].read(self.origin.source) for name in trained}
            self._originals = {name: torch.nn.Parameter(value, False) for name, value in read.items()}
        try:
            self._put(self._originals)
            yield
        finally:
            self._put(trained)

    def _put(self, parameters: dict[str, Any]) -> None:
        for name, parameter in parameters.items():
            setattr(self.places[name].layer, self.places[name].attribute, parameter)


def _under(name: str, shard: ShardedTensor) -> ShardedTensor:
    """The shard as one of a tensor of its own: layers of a homogeneous model are parts of one otherwise."""
    lead = shard.prepend_axis_num
    grid = None if shard.axis_fragmentations is None else shard.axis_fragmentations[lead:]
    return replace(
        shard, key=name, prepend_axis_num=0, axis_fragmentations=grid, global_shape=shard.global_shape[lead:],
        global_offset=shard.global_offset[lead:],
    )  # fmt: skip
