"""Losses of a forward pass, in the form that megatron-core's schedules ask for."""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]


def language_model_loss(loss_mask: Tensor, token_losses: Tensor) -> LossResult:
    """Cross entropy summed over the weighted tokens of one micro batch.

    Args: loss_mask, token_losses: [B, S].
    Returns: (sum of weighted losses, number of tokens with a weight, {"lm": [sum, number]}). The schedule divides the
        gradients by the number of tokens of the whole global batch (or of the micro batch, without per-token loss).
    """
    mask = loss_mask.float()
    total = (token_losses.float() * mask).sum()
    count = (mask != 0).sum().int()
    return total, count, {"lm": torch.stack([total.detach(), count.float()])}


def reduce_over_ranks(values: Tensor) -> Tensor:
    """Sum a vector over the data-parallel ranks and hand the last pipeline stage's result to every stage. Collective.

    Only the last stage computes losses; the other stages pass zeros.
    """
    values = values.clone()
    torch.distributed.all_reduce(values, group=mpu.get_data_parallel_group(with_context_parallel=True))
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            values, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group()
        )
    return values
