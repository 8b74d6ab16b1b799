"""Context parallelism: each rank holds two pieces of every sample, one from its front and one from its end.

A causal token reads what precedes it, so the pair costs the same on every rank: of 2 N equal pieces of a sample, rank r of
N has pieces r and 2 N - 1 - r. This is also how Transformer Engine and megatron-core's rotary embeddings divide.
Shapes: T tokens of all ranks, N ranks.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor


def ranks() -> int:
    """That share each sample; one where no parallel groups are."""
    return mpu.get_context_parallel_world_size() if mpu.model_parallel_is_initialized() else 1  # type: ignore[no-any-return]


def owners(bounds: Tensor, size: int) -> Tensor:
    """[T]: the rank that holds each token.

    Args: bounds: int [samples + 1], where each sample begins and the last one ends; lengths are multiples of 2 `size`.
    """
    places = torch.arange(int(bounds[-1]), device=bounds.device)
    sample = torch.searchsorted(bounds[1:].contiguous(), places, right=True)
    piece = (bounds.diff()[sample] // (2 * size)).clamp(min=1)
    number = (places - bounds[sample]) // piece
    return torch.minimum(number, 2 * size - 1 - number)


def places(bounds: Tensor, size: int, rank: int) -> Tensor:
    """[T / size]: where the tokens of this rank stand among all, in the order in which it holds them."""
    if size == 1:  # any lengths
        return torch.arange(int(bounds[-1]), device=bounds.device)
    return (owners(bounds, size) == rank).nonzero().squeeze(1)


def my_places(bounds: Tensor) -> Tensor:
    """`places` of this process."""
    return places(bounds, ranks(), mpu.get_context_parallel_rank())


def positions(bounds: Tensor) -> Tensor:
    """[T / N]: how many tokens of its sample precede each token of this rank."""
    mine = my_places(bounds)
    return mine - bounds[torch.searchsorted(bounds[1:].contiguous(), mine, right=True)]


def gather(x: Tensor, bounds: Tensor) -> Tensor:
    """[T / N, ...] of this rank -> [T, ...] in the order of the text. Gradients of all ranks are summed. Collective."""
    size = ranks()
    if size == 1:
        return x
    whole = gather_from_sequence_parallel_region(x, True, group=mpu.get_context_parallel_group())
    order = torch.cat([places(bounds, size, rank) for rank in range(size)])
    return whole.index_select(0, order.argsort())  # type: ignore[no-any-return]


def add_up(x: Tensor) -> Tensor:
    """Sum over the ranks that share samples; each keeps the gradient of its own part. Collective."""
    if ranks() == 1:
        return x
    return reduce_from_tensor_model_parallel_region(x, group=mpu.get_context_parallel_group())  # type: ignore[no-any-return]
