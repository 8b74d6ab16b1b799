"""All-gather and reduce-scatter of two GPUs that write into each other's memory, in the place of NCCL's.

Under tensor parallelism with sequence parallelism, and where two ranks share experts, every layer waits for several of
them. NCCL takes twice as long as the bytes need for the few MB of one; here one kernel sends a part, waits for the
other GPU's and takes it over. Same results as NCCL's: two numbers are added once.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

from swiftlite.utils.logger import get_logger

logger = get_logger()

PROGRAMS = 64  # blocks of the kernel: enough to fill NVLink, few enough to leave most of the GPU to others
WARPS = 16
VECTORS = 4  # of 16 bytes that a thread reads before it writes
HEAD = 4096  # bytes before the data, for the flags of the programs
MOST_BYTES = 256 << 20  # of what one rank sends at once; larger ones are NCCL's


@triton.jit
def _exchange_kernel(
    sent_ptr, kept_ptr, out_ptr, copy_ptr, mine_ptr, theirs_ptr, my_flags, their_flags, epochs_ptr, numel, room,
    REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Send `sent` to the other GPU, take what it sent: out = that, or with REDUCE that + kept. copy: sent once more.

    Its memory has two halves, used in turn. A program knows that the other GPU's has read a half to its end when it gets
    the data after it, so writing there needs no question. Flags hold the number of the exchange.
    """
    program = tl.program_id(0)
    step = tl.num_programs(0) * BLOCK
    epoch = tl.load(epochs_ptr + program) + 1
    half = (epoch % 2).to(tl.int64) * room
    for start in range(program * BLOCK, numel, step):
        places = start + tl.arange(0, BLOCK)
        inside = places < numel
        value = tl.load(sent_ptr + places, mask=inside)
        tl.store(theirs_ptr + half + places, value, mask=inside)
        if not REDUCE:
            tl.store(copy_ptr + places, value, mask=inside)
    tl.debug_barrier()
    tl.atomic_xchg(their_flags + program, epoch, sem="release", scope="sys")
    while tl.atomic_add(my_flags + program, 0, sem="acquire", scope="sys") < epoch:
        pass
    tl.debug_barrier()
    for start in range(program * BLOCK, numel, step):
        places = start + tl.arange(0, BLOCK)
        inside = places < numel
        value = tl.load(mine_ptr + half + places, mask=inside, cache_modifier=".cg")
        if REDUCE:
            kept = tl.load(kept_ptr + places, mask=inside)
            value = (value.to(tl.float32) + kept.to(tl.float32)).to(kept.dtype)
        tl.store(out_ptr + places, value, mask=inside)
    tl.debug_barrier()
    tl.store(epochs_ptr + program, epoch)


class _Work:
    """What an asynchronous collective returns."""

    def __init__(self, event: torch.cuda.Event, *kept: Tensor) -> None:
        self._event, self._kept = event, kept  # their memory must not be given to others before

    def wait(self, *_: object) -> bool:
        torch.cuda.current_stream().wait_event(self._event)
        self._kept = ()
        return True

    def is_completed(self) -> bool:
        return bool(self._event.query())


class PeerGroup:
    """The collectives of a group of two."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.rank = group, group.rank()
        self.room = 0
        self.parts: list[tuple[Tensor, ...]] = []  # memory here and there, epochs; graphs may still use earlier ones
        self.stream = torch.cuda.Stream(priority=-1)  # one after the other on both GPUs, whatever waits for them

    def _make_room(self, nbytes: int) -> None:
        """Memory that the other GPU can write to. Collective."""
        symmetric: Any = importlib.import_module("torch.distributed._symmetric_memory")
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used, and some machines cannot bear it
        torch.cuda.synchronize()
        if not self.room and dist.get_rank() == 0:
            logger.info("GPUs %s exchange through each other's memory", dist.get_process_group_ranks(self.group))
        self.room = max(1 << (nbytes - 1).bit_length(), 1 << 20)
        memory = symmetric.empty(HEAD + 2 * self.room, dtype=torch.uint8, device=torch.cuda.current_device())
        memory.zero_()
        theirs = symmetric.rendezvous(memory, self.group).get_buffer(1 - self.rank, memory.shape, torch.uint8)
        self.parts.append((memory, theirs, torch.zeros(PROGRAMS, dtype=torch.int32, device="cuda")))
        torch.cuda.synchronize()
        dist.barrier(self.group)

    def takes(self, sent: Tensor, nbytes: int) -> bool:
        """True if this can exchange `nbytes` of a tensor like `sent`; the same on both ranks. Collective."""
        plain = sent.dtype in (torch.bfloat16, torch.float32, torch.uint8, torch.float16)
        if not plain or nbytes % 16 or not 0 < nbytes <= MOST_BYTES:
            return False
        if nbytes > self.room:
            if torch.cuda.is_current_stream_capturing():
                return False
            try:
                self._make_room(nbytes)
            except RuntimeError as error:  # GPUs that cannot reach each other; on both sides then
                logger.warning("NCCL exchanges what two GPUs could exchange themselves: %s", str(error).splitlines()[0])
                del _groups[self.group]
                return False
        return True

    def all_gather(self, out: Tensor, sent: Tensor) -> _Work:
        mine, theirs = out.view(2, -1)[self.rank], out.view(2, -1)[1 - self.rank]
        return self._exchange(sent, sent, theirs, mine, False)

    def reduce_scatter(self, out: Tensor, parts: Tensor) -> _Work:
        kept, sent = parts.view(2, -1)[self.rank], parts.view(2, -1)[1 - self.rank]
        return self._exchange(sent, kept, out, out, True)

    def _exchange(self, sent: Tensor, kept: Tensor, out: Tensor, copy: Tensor, reduce: bool) -> _Work:
        given = sent, kept, out, copy
        if not reduce:  # bytes, whatever they mean
            sent, kept, out, copy = (t.view(-1).view(torch.int32) for t in given)
        *memories, epochs = self.parts[-1]
        mine, theirs = (memory[HEAD:].view(sent.dtype) for memory in memories)
        my_flags, their_flags = (memory[: 4 * PROGRAMS].view(torch.int32) for memory in memories)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            _exchange_kernel[(PROGRAMS,)](
                sent, kept, out, copy, mine, theirs, my_flags, their_flags, epochs, sent.numel(),
                self.room // sent.element_size(),
                REDUCE=reduce, BLOCK=VECTORS * WARPS * 32 * 16 // sent.element_size(), num_warps=WARPS,
            )  # fmt: skip
            event = torch.cuda.Event()
            event.record()
        return _Work(event, *given)


_groups: dict[ProcessGroup, PeerGroup] = {}
_all_gather, _reduce_scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor


def all_gather_into_tensor(
    output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | _Work | None:
    """As torch.distributed's."""
    peer = _peer(group, output_tensor, input_tensor, input_tensor.nbytes)
    if peer is None:
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
    return _ended(peer.all_gather(output_tensor, input_tensor), async_op)


def reduce_scatter_tensor(
    output: Tensor,
    input: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | _Work | None:
    """As torch.distributed's."""
    adds = op == dist.ReduceOp.SUM and input.is_floating_point()
    peer = _peer(group, output, input, output.nbytes) if adds else None
    if peer is None:
        return _reduce_scatter(output, input, op=op, group=group, async_op=async_op)
    return _ended(peer.reduce_scatter(output, input), async_op)


def _peer(group: ProcessGroup | None, out: Tensor, sent: Tensor, nbytes: int) -> PeerGroup | None:
    """What exchanges `nbytes` of `sent` in the place of NCCL. Several that are to be NCCL's one are left to it."""
    peer = None if group is None else _groups.get(group)
    if peer is None or group in dist.distributed_c10d._world.pg_coalesce_state:
        return None
    fits = out.is_contiguous() and sent.is_contiguous() and out.dtype == sent.dtype
    return peer if fits and peer.takes(sent, nbytes) else None


def _ended(work: _Work, async_op: bool) -> _Work | None:
    if async_op:
        return work
    work.wait()
    return None


def serve(groups: list[ProcessGroup]) -> None:
    """Take over the collectives of those groups that are two GPUs of this host. Collective."""
    from megatron.core.tensor_parallel import layers, mappings

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for group in groups:
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) == 2 and ranks[0] // here == ranks[1] // here and group not in _groups:
            _groups[group] = PeerGroup(group)
    if _groups:
        torch_distributed: Any = dist
        torch_distributed.all_gather_into_tensor = all_gather_into_tensor
        torch_distributed.reduce_scatter_tensor = reduce_scatter_tensor
        for module in (layers, mappings):
            module.dist_all_gather_func = all_gather_into_tensor
            module.dist_reduce_scatter_func = reduce_scatter_tensor


def forget() -> None:
    """Give the memory back; NCCL serves all groups again."""
    _groups.clear()
