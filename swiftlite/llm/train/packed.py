"""Joined samples on the Hugging Face side: does a model keep them apart, and the mask for one that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.llm.model.loader import embedding_rows
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = 8  # tokens of each of the two probe samples


def block_diagonal_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive causal mask [B, 1, S, S] in which each sample sees itself only: 0 or the lowest number of `dtype`.

    position_ids: [B, S]; a sample begins wherever they do not count on.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    sample = starts.cumsum(-1)
    size = position_ids.shape[1]
    allowed = (sample[:, :, None] == sample[:, None, :]) & torch.ones(size, size, dtype=torch.bool).tril().to(
        position_ids.device
    )
    mask = torch.zeros(allowed.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


@torch.no_grad()
def _leak(model: PreTrainedModel, device: torch.device, with_mask: bool, joined: bool) -> float:
    """How much the second half's logits move when the first half's tokens change."""
    vocabulary = embedding_rows(model)
    tokens = torch.arange(2 * _HALF, device=device).remainder(vocabulary).unsqueeze(0)
    changed = tokens.clone()
    changed[:, :_HALF] = (tokens[:, :_HALF] + vocabulary // 2) % vocabulary
    positions = torch.arange(_HALF if joined else 2 * _HALF, device=device).repeat(2 if joined else 1).unsqueeze(0)
    extra = {"attention_mask": block_diagonal_mask(positions, model.dtype)} if with_mask else {}
    if hasattr(model, "score"):  # a head that gives numbers of chosen tokens
        extra["pooled"] = torch.arange(2 * _HALF, device=device)
    first, second = (
        model(input_ids=ids, position_ids=positions, use_cache=False, **extra)[0].flatten(0, -2)[_HALF:].float()
        for ids in (tokens, changed)
    )
    return float((first - second).abs().max())


def needs_mask(model: PreTrainedModel, device: torch.device) -> bool:
    """True if the model must be given block_diagonal_mask to keep joined samples apart; tried with a few tokens.

    Newer models of transformers find the borders in position_ids. Raises: UsageError if neither keeps them apart.
    """
    training = model.training
    model.eval()
    try:
        seen = _leak(model, device, with_mask=False, joined=False)  # one sample: its second half does see the first
        if seen == 0 or _leak(model, device, with_mask=False, joined=True) < 0.05 * seen:
            return False
        try:
            leak = _leak(model, device, with_mask=True, joined=True)
        except (RuntimeError, ValueError, TypeError):  # flash kernels take no such mask
            leak = seen
        if leak >= 0.05 * seen:
            raise UsageError(
                "--packing or --padding_free true: this model's attention does not keep joined samples apart; leave the "
                "flag out, or choose another kernel with --attn_impl sdpa"
            )
        get_logger().info("samples are kept apart by an explicit mask; long sequences need much memory")
        return True
    finally:
        model.train(training)
