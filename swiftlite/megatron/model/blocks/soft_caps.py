"""Caps on attention scores and on logits (Gemma 2): x becomes cap * tanh(x / cap).

Neither Transformer Engine nor megatron-core caps scores, so these models have the core attention of the local spec.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.attention import SdpaAttention, in_place_of_te


def replacements(args: MegatronArguments) -> dict[object, object]:
    return {} if args.description.attn_logit_softcapping is None else in_place_of_te()


def adapt(model: MegatronModule, args: MegatronArguments) -> None:
    for module in model.modules():
        if isinstance(module, SdpaAttention):
            module.cap = args.description.attn_logit_softcapping
    cap = args.description.final_logit_softcapping
    if cap is None or not hasattr(model, "output_layer"):
        return

    def hook(_: object, __: object, output: tuple[Tensor, object]) -> tuple[Tensor, object]:
        logits, bias = output
        return cap * torch.tanh(logits / cap), bias

    model.output_layer.register_forward_hook(hook, prepend=True)  # before logits of padded rows become -inf
