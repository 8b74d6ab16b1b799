"""Norms of queries and keys after their rotation (Hunyuan); megatron-core has them before it.

Weights and names are those of megatron-core's norms, which let their input through and are applied by core attention.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments


def adapt(model: Any, args: MegatronArguments) -> None:
    for attention in model.modules():
        if isinstance(attention, SelfAttention) and args.description.qk_layernorm:
            _defer(attention)


def _defer(attention: Any) -> None:
    norm_q, norm_k = attention.q_layernorm.forward, attention.k_layernorm.forward
    attention.q_layernorm.forward = attention.k_layernorm.forward = _unchanged

    def hook(_: object, inputs: tuple[object, ...]) -> tuple[object, ...]:
        query, key, *rest = inputs  # [S, B, heads, D], packed [T, heads, D]
        return norm_q(query), norm_k(key), *rest

    attention.core_attention.register_forward_pre_hook(hook)


def _unchanged(x: Tensor) -> Tensor:
    return x
