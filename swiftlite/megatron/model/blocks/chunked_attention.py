"""Layers that rotate and see their own chunk of the text, and layers that see all of it and do neither (Llama 4).

The former's queries and keys have norms without weights after rotation; the latter's queries are multiplied with
1 + scale ln(1 + floor((position + 1) / floor)). Neither is in Transformer Engine, so these models have the core attention
of the local spec.

Shapes: S sequence, B batch, D head width, T packed tokens.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.attention import in_place_of_te
from swiftlite.megatron.model.blocks.position_factor import scale_queries


def replacements(args: MegatronArguments) -> dict[object, object]:
    return in_place_of_te()


def adapt(model: MegatronModule, args: MegatronArguments) -> None:
    described = args.description
    for attention in model.modules():
        if not isinstance(attention, SelfAttention):
            continue
        core = attention.core_attention
        if not model.config.no_rope_freq[attention.layer_number - 1]:
            core.chunk = described.attention_chunk_size
            if described.qk_norm_of_rotated:
                _normalise(core, described.norm_epsilon)
        elif described.attn_temperature is not None:
            scale_queries(core, described.attn_temperature["scale"], described.attn_temperature["floor"], 1, args)


def _normalise(core: torch.nn.Module, eps: float) -> None:
    def hook(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        query, key, *rest = inputs  # [S, B, heads, D], packed [T, heads, D]
        normed = (torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) for x in (query, key))
        return *normed, *rest

    core.register_forward_pre_hook(hook)
