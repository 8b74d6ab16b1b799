"""Norms of queries and keys over all heads together (OLMo 2, OLMoE, MiniMax-M2), not over each head.

Tensor parallel ranks hold some of the heads each, so they add up the squares. Each has the whole weight, as on disk
(`self_attention.q_layernorm.weight` [N*D], `k_layernorm.weight` [G*D]; stock megatron-core's have [D]): megatron-core adds
up the gradients of weights of these names over the ranks.

Shapes: S sequence, B batch, N query heads, G key heads, D head width; n heads of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.layers import RMSNorm


class FullNorm(RMSNorm):
    """Of `heads` heads. With fewer heads than ranks a head is on several ranks, and its squares count on each."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int) -> None:
        super().__init__(config, heads * hidden_size, eps)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, n, D] -> the same."""
        group = mpu.get_tensor_model_parallel_group()
        size, rank = group.size(), group.rank()
        if size == 1:
            return super().forward(x.flatten(-2)).view(x.shape)
        here, width = x.shape[-2:]
        wide = x.float()
        squares = wide.square().sum((-2, -1), keepdim=True)
        # Every rank's heads depend on the sum, so its gradient is a sum over ranks too.
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        weight = self.weight.view(self.heads, width).narrow(0, rank * self.heads // size, here).float()
        if self.zero_centered_gamma:
            weight = weight + 1
        return (wide * torch.rsqrt(squares / (here * size * width) + self.eps) * weight).to(x.dtype)


class QueryNorm(FullNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, config.num_attention_heads)


class KeyNorm(FullNorm):
    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, config.num_query_groups)


def change_layer(layer: Any, args: MegatronArguments, index: int) -> None:
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
