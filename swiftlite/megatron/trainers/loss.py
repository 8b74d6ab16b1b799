"""Losses of a forward pass, in the form that megatron-core's schedules ask for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.megatron.context import add_up, ranks
from swiftlite.megatron.model.blocks.router import routing_of
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.train.plugins import TokenLoss

LossResult = tuple[Tensor, Tensor, dict[str, Tensor]]
LossFunction = Callable[[Tensor], LossResult]


def token_losses(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """One micro batch through one model chunk: cross entropy of each label [B, S] on the last pipeline stage.

    Other stages give the hidden states that the next one takes. Rows that pad the vocabulary count for nothing.
    """
    return _forward(model, batch, labels=batch.labels, loss_mask=batch.loss_mask)


def token_outputs(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """As `token_losses`, but logits [B, S, V] of this rank's rows V of the vocabulary, -inf for rows that pad it; or the
    scores [B, S, W] of a head."""
    return _forward(model, batch)


def _forward(model: torch.nn.Module, batch: MicroBatch, **labels: Tensor) -> Tensor:
    with routing_of(batch.router_tokens()):
        output: Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.position_ids,
            attention_mask=None,
            packed_seq_params=batch.packed_seq_params,
            **labels,
        )
    return output


def language_model_loss(
    loss_mask: Tensor,
    losses: Tensor,
    per_token: bool = True,
    token_loss: TokenLoss | None = None,
    report: Callable[[Tensor], dict[str, Tensor]] | None = None,
) -> LossResult:
    """Cross entropy summed over the weighted tokens of one micro batch.

    Args: loss_mask, losses: [B, S]. per_token: what is logged is a mean over all tokens; if not, over micro batches.
        token_loss: what takes the place of each token's cross entropy. report: makes more sums of the weighted losses
        [B, S].
    Returns: (sum of weighted losses, number of tokens with a weight, both by name as they add up to what is logged). The
        schedule divides the gradients by the number of tokens of the whole global batch (or of the micro batch, without
        per-token loss), and without it divides the sum in place.
    """
    mask = loss_mask.float()
    losses = losses.float()
    weighted = (losses if token_loss is None else token_loss(losses.flatten()).view_as(losses)) * mask
    total, more = weighted.sum(), report(weighted.detach()) if report else {}
    count = (mask != 0).sum().int()
    if per_token:
        return total, count, {"loss": total.detach().clone(), "trained_tokens": count, **more}
    count = add_up(count)
    mean = total.detach() / count.clamp(min=1)
    parts = ranks()  # each reports its part of one mean
    # The gradients are averaged over these ranks as well, though each has a part of the mean only.
    return total * parts, count, {"loss": mean, "trained_tokens": torch.ones_like(mean) / parts, **more}


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
