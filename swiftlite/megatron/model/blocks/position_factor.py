"""Queries times 1 + beta ln(1 + floor(position / original length)), after rotation (Ministral 3, Llama 4).

Shapes: S sequence, B batch, N heads, D head width, T packed tokens.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.context import positions
from swiftlite.utils.types import Settings


def adapt(model: MegatronModule, args: MegatronArguments) -> None:
    settings = args.description.rope_scaling or {}
    beta, original = settings["llama_4_scaling_beta"], settings["original_max_position_embeddings"]
    for attention in model.modules():
        if isinstance(attention, SelfAttention):
            scale_queries(attention.core_attention, beta, original, 0, args)


def scale_queries(core: torch.nn.Module, beta: float, length: int, first: int, args: MegatronArguments) -> None:
    """Have core attention multiply queries with 1 + beta ln(1 + floor((first + position) / length))."""

    def scale(_: object, inputs: tuple[Tensor, ...], kwargs: Settings) -> tuple[tuple[Tensor, ...], Settings]:
        query, *rest = inputs  # [S, B, N, D], packed [T, N, D]
        packed = kwargs.get("packed_seq_params")
        bounds = None if packed is None else packed.cu_seqlens_q
        where = positions(len(query) * args.context_parallel_size, bounds, query.device)
        factor = 1 + beta * torch.log1p(torch.floor((first + where) / length))
        return (query * factor.view(-1, *[1] * (query.dim() - 1)).to(query.dtype), *rest), kwargs

    core.register_forward_pre_hook(scale, with_kwargs=True)
