"""What a rank holds of a model, and which entry of the weight map that is.

It is read off the modules' own `sharded_state_dict()`, so every parallel layout is covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from swiftlite.utils.errors import MapError
from swiftlite.utils.types import Settings
from swiftlite.weights.dcp_file import is_state
from swiftlite.weights.rule import BoundMap, Entry
from swiftlite.weights.torch_dist import slot_of


def iter_shards(models: Sequence[torch.nn.Module]) -> Iterator[ShardedTensor]:
    """Every weight shard of the model chunks on this rank; `data` are views of the live tensors.

    Gated MLPs come as two shards, one in each half of the global tensor.
    """
    metadata: Settings = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    for model in models:
        yield from flatten_shards(unwrap(model).sharded_state_dict(metadata=metadata))


def unwrap(model: torch.nn.Module) -> MegatronModule:
    """The GPTModel inside Float16Module and DDP."""
    inner: Any = model
    while hasattr(inner, "module"):
        inner = inner.module
    return inner


def flatten_shards(value: object) -> Iterator[ShardedTensor]:
    """The weight shards in a sharded state dict, factories built; `data` are views of the tensors it was made from."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from flatten_shards(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from flatten_shards(item)
    elif isinstance(value, ShardedTensorFactory):
        yield from flatten_shards(value.build())
    elif isinstance(value, ShardedTensor) and not is_state(value.key) and value.data is not None:
        yield value


class LiveMap:
    """Finds the entry of a live shard."""

    def __init__(self, bound: BoundMap) -> None:
        slots = ((slot_of(entry), entry) for entry in bound.entries)
        self._by_slot = {(slot.key, slot.index): entry for slot, entry in slots}

    def entry(self, shard: ShardedTensor) -> tuple[Entry, tuple[int, ...]]:
        """(entry, offset of the shard within it). Raises: MapError for a tensor that no rule covers."""
        lead = shard.prepend_axis_num
        entry = self._by_slot.get((shard.key, tuple(shard.global_offset[:lead])))
        if entry is None:
            raise MapError(f"the model has {shard.key}{list(shard.global_offset[:lead])}, which no weight rule covers")
        return entry, tuple(shard.global_offset[lead:])
