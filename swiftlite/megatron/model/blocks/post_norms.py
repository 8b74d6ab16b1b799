"""Norms of what attention and MLP give, before it is added to the residual (GLM-4-0414, Gemma, OLMo 2, EXAONE 4).

On disk `post_self_attn_layernorm.weight` and `post_mlp_layernorm.weight` of a layer; stock megatron-core has no such norms.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.layers import layer_norm


def adapt(model: Any, args: MegatronArguments) -> None:
    for layer in model.modules():
        if isinstance(layer, TransformerLayer):
            layer.post_self_attn_layernorm = layer_norm(model.config)
            layer.post_mlp_layernorm = layer_norm(model.config)
            _normalise(layer.self_attention, layer.post_self_attn_layernorm)
            _normalise(layer.mlp, layer.post_mlp_layernorm)


def _normalise(part: Any, norm: Any) -> None:
    def hook(_: object, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        hidden, bias = output  # [S, B, H], [H]
        return norm(hidden if bias is None else hidden + bias), None

    part.register_forward_hook(hook)
