"""Process group, megatron-core's parallel groups and seeds. The layout is handed on as a value, `ParallelState`.

Works with and without torchrun: one plain process gets a group of its own.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from swiftlite.arguments.parallel import ParallelArguments
from swiftlite.megatron import backend
from swiftlite.utils.dist import get_rank, get_world_size
from swiftlite.utils.errors import UsageError

_owns_group = False  # this module made the process group, so it takes it down


@dataclass(frozen=True)
class ParallelState:
    """Sizes of the parallel axes and this process' place on each."""

    rank: int
    world_size: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    dp_size: int
    dp_rank: int
    ep_size: int
    cp_size: int
    cp_rank: int
    vpp_size: int | None

    @property
    def is_last_stage(self) -> bool:
        """This process holds the output layer, in its last model chunk."""
        return self.pp_rank == self.pp_size - 1

    def describe(self) -> str:
        sizes = {"TP": self.tp_size, "PP": self.pp_size, "VPP": self.vpp_size or 1, "EP": self.ep_size,
                 "CP": self.cp_size, "DP": self.dp_size}  # fmt: skip
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return named or "one process"


def initialize(args: ParallelArguments) -> ParallelState:
    """Make the process group and the parallel groups of `args`, set all seeds. Collective.

    Args: args: fields of ParallelArguments, `seed`.
    Raises: UsageError if the sizes do not divide the number of processes, before any group is made.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    global _owns_group
    found = backend.setup()
    world_size = get_world_size()
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    args.data_parallel_size(world_size)
    vpp = args.num_virtual_stages_per_pipeline_rank
    if vpp is not None and vpp > 1 and pp == 1:
        raise UsageError(
            f"--num_virtual_stages_per_pipeline_rank {vpp}: needs --pipeline_model_parallel_size of at least 2"
        )
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    if not dist.is_initialized():
        _owns_group = True
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(found.collectives, timeout=timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(found.collectives, store=store, rank=0, world_size=1, timeout=timeout)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp and vpp > 1 else None,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
    )
    if found.is_cuda and found.spec == "te":  # Triton comes with it
        from swiftlite.megatron import peer_memory

        peer_memory.serve([mpu.get_tensor_model_parallel_group(), mpu.get_expert_model_parallel_group()])
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model_parallel_cuda_manual_seed(args.seed)
    return get_parallel_state()


def get_parallel_state() -> ParallelState:
    """The layout in force. Call after `initialize`."""
    from megatron.core import parallel_state as mpu

    return ParallelState(
        rank=get_rank(),
        world_size=dist.get_world_size(),
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        dp_size=mpu.get_data_parallel_world_size(),
        dp_rank=mpu.get_data_parallel_rank(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        cp_size=mpu.get_context_parallel_world_size(),
        cp_rank=mpu.get_context_parallel_rank(),
        vpp_size=mpu.get_virtual_pipeline_model_parallel_world_size(),
    )


def destroy() -> None:
    """Take down what `initialize` made; a process group that was there before stays."""
    global _owns_group
    from megatron.core import parallel_state as mpu

    if "swiftlite.megatron.peer_memory" in sys.modules:
        sys.modules["swiftlite.megatron.peer_memory"].forget()
    if mpu.model_parallel_is_initialized():
        # megatron-core forgets its groups and leaves them, with their threads, to a process group that stays.
        groups = [group for group in mpu._global_process_group_list or () if group is not None]
        mpu.destroy_model_parallel()
        for group in groups:
            if group in dist.distributed_c10d._world.pg_map:  # it ends some itself
                dist.destroy_process_group(group)
    if _owns_group and dist.is_initialized():
        dist.destroy_process_group()
    _owns_group = False


@contextmanager
def parallel_groups(args: ParallelArguments) -> Iterator[ParallelState]:
    """`initialize`, and `destroy` however the block ends; inside such a block, the groups that are there."""
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        yield get_parallel_state()
        return
    try:
        yield initialize(args)
    finally:
        destroy()
