"""Constant factors on embeddings, on what a layer adds to the residual, and on logits (Granite).

They act on activations: folded into weights, these would not come back bit by bit. The factor on the scores of attention is
megatron-core's `softmax_scale`.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments


def adapt(model: Any, args: MegatronArguments) -> None:
    embedding, residual = args.description.embedding_multiplier, args.description.residual_multiplier
    divisor = args.description.logits_scaling
    if hasattr(model, "embedding") and embedding != 1:
        model.embedding.register_forward_hook(lambda _, __, hidden: hidden * embedding)

    def scale(_: object, __: object, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        hidden, bias = output
        return hidden * residual, None if bias is None else bias * residual

    for layer in model.modules() if residual != 1 else ():
        if isinstance(layer, TransformerLayer):
            layer.self_attention.register_forward_hook(scale)
            layer.mlp.register_forward_hook(scale)
    if hasattr(model, "output_layer") and divisor != 1:
        model.output_layer.register_forward_hook(lambda _, __, output: (output[0] / divisor, output[1]))
