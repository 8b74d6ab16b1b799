"""Layers without norms before attention and MLP (OLMo 2, EXAONE 4): they have `post_norms`.

With Transformer Engine the linear layers that norms are fused into become plain ones, so `linear_qkv.layer_norm_weight`
and `linear_fc1.layer_norm_weight` do not exist.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend


def replacements(args: MegatronArguments) -> dict[object, object]:
    if backend.setup().spec != "te":
        return {}
    from megatron.core.extensions import transformer_engine as te

    return {te.TELayerNormColumnParallelLinear: te.TEColumnParallelLinear}


def change_layer(layer: Any, args: MegatronArguments, index: int) -> None:
    layer.submodules.input_layernorm = IdentityOp
    layer.submodules.pre_mlp_layernorm = IdentityOp
