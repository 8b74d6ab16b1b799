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


def places(total: int, bounds: Tensor | None, size: int, rank: int, device: torch.device | str | None = None) -> Tensor:
    """[T / size]: where the tokens of one rank stand among all, in the order in which it holds them.

    Args: total: T. bounds: int [samples + 1], where each sample begins and the last one ends; None: there is one. Lengths
        are multiples of 2 `size`, unless that is 1. device: of the result. Waits for no GPU where `size` is 1.
    """
    everything = torch.arange(total, device=device)
    if size == 1:
        return everything
    return (_owners(everything, bounds, size) == rank).nonzero().squeeze(1)


def _owners(places: Tensor, bounds: Tensor | None, size: int) -> Tensor:
    """The rank that holds the token at each place."""
    if bounds is None:
        number = places // (len(places) // (2 * size))
    else:
        sample = samples(places, bounds)
        number = (places - bounds[sample]) // (bounds.diff()[sample] // (2 * size))
    return torch.minimum(number, 2 * size - 1 - number)


def samples(places: Tensor, bounds: Tensor) -> Tensor:
    """The sample of each place; what stands behind the last one counts as a further one."""
    return torch.searchsorted(bounds[1:].contiguous(), places, right=True)


def my_places(total: int, bounds: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """`places` of this process."""
    return places(total, bounds, ranks(), mpu.get_context_parallel_rank(), device)


def positions(total: int, bounds: Tensor | None, device: torch.device) -> Tensor:
    """[T / N]: how many tokens of its sample precede each token of this rank."""
    mine = my_places(total, bounds, device)
    return mine if bounds is None else mine - bounds[samples(mine, bounds)]


def gather(bounds: Tensor | None, *parts: Tensor) -> tuple[Tensor, ...]:
    """Each [T / N, ...] of this rank -> [T, ...] in the order of the text. Gradients of all ranks are summed. Collective."""
    size = ranks()
    if size == 1:
        return parts
    everything = torch.arange(len(parts[0]) * size, device=parts[0].device)
    order = _owners(everything, bounds, size).argsort(stable=True).argsort()
    group = mpu.get_context_parallel_group()
    wholes = (gather_from_sequence_parallel_region(part, True, group=group) for part in parts)
    return tuple(whole.index_select(0, order) for whole in wholes)


def add_up(x: Tensor) -> Tensor:
    """Sum over the ranks that share samples; each keeps the gradient of its own part. Collective."""
    if ranks() == 1:
        return x
    return reduce_from_tensor_model_parallel_region(x, group=mpu.get_context_parallel_group())  # type: ignore[no-any-return]
