"""Rows of all ranks as one tensor, with gradients back to those who have them. torch only."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks in their order, [N, ...] of [n, ...]; ranks may have different numbers. Collective.

    A rank's gradient is the sum of what all ranks' losses say of its rows: each rank's loss is to be its own share.
    Without a process group the tensor itself.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return tensor
    size = dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(tensor)], dtype=torch.int64, device=tensor.device), group=group)
    gathered: Tensor = _GatherRows.apply(tensor, [int(count) for count in counts], group)  # type: ignore[no-untyped-call]
    return gathered


class _Context(torch.autograd.function.FunctionCtx):
    counts: list[int]
    group: dist.ProcessGroup | None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        most = max(counts)
        padded = tensor.new_zeros(most, *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        first = sum(ctx.counts[:rank])
        return total[first : first + ctx.counts[rank]], None, None
