"""Layer specs of the models, and the names under which the layers of the local spec stand on disk."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from swiftlite.megatron import backend
from swiftlite.megatron.model.blocks.attention import SdpaAttention
from swiftlite.megatron.model.layers import CompiledRMSNorm, RMSNorm


def substitute(spec: Any, table: Mapping[Any, Any]) -> Any:
    """Return a copy of a layer spec with classes replaced; follows dataclasses, lists and partial()."""
    if isinstance(spec, type) or isinstance(spec, types.FunctionType):
        return table.get(spec, spec)
    if isinstance(spec, functools.partial):
        args = [substitute(a, table) for a in spec.args]
        kwargs = {k: substitute(v, table) for k, v in spec.keywords.items()}
        return functools.partial(table.get(spec.func, spec.func), *args, **kwargs)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changed = {f.name: substitute(getattr(spec, f.name), table) for f in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changed)
    if isinstance(spec, list | tuple):
        return type(spec)(substitute(item, table) for item in spec)
    return spec


def _is_moe(layer_spec: Any) -> bool:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = layer_spec.submodules.mlp
    kind = getattr(mlp, "module", None) or getattr(mlp, "func", mlp)
    return isinstance(kind, type) and issubclass(kind, MoELayer)


def disk_names(is_moe: bool, is_mla: bool) -> dict[str, str]:
    """Prefixes of the local spec's names in one layer -> the names under which Transformer Engine's spec saves them."""
    names = {}
    if is_mla:
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not is_moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names


def block_spec(
    config: TransformerConfig, vp_stage: int | None = None, replace: Mapping[object, object] | None = None
) -> Any:
    """Return the TransformerBlockSubmodules of this rank's pipeline stage.

    replace: classes of megatron-core -> a family's own ones (unusual routers, for one).
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    use_te = backend.setup().spec == "te"
    spec = get_gpt_decoder_block_spec(config, use_te, normalization=config.normalization, vp_stage=vp_stage)
    if use_te:
        if config.qk_layernorm and not config.multi_latent_attention:
            for layer in spec.layer_specs:
                # Transformer Engine's norm takes longer to start, twice a layer, than to compute on such narrow heads.
                attention = layer.submodules.self_attention.submodules
                attention.q_layernorm = attention.k_layernorm = CompiledRMSNorm
        return substitute(spec, replace) if replace else spec
    spec = substitute(spec, {DotProductAttention: SdpaAttention, WrappedTorchNorm: RMSNorm, **(replace or {})})
    # With Apex installed the local functions pick its norm for the block; every norm here is RMSNorm.
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        if config.multi_latent_attention and config.q_lora_rank is None:
            # The spec names a norm of the query latent, which these models lack; 0.19 refuses what it would not use.
            layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
        layer.submodules.sharded_state_dict_keys_map = disk_names(_is_moe(layer), config.multi_latent_attention)
    return spec


def mtp_spec(config: TransformerConfig, spec: Any, vp_stage: int | None = None) -> Any:
    """Return the multi-token-prediction block spec for this stage, or None. `spec` is `block_spec`'s result."""
    if not config.mtp_num_layers:
        return None
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    use_te = backend.setup().spec == "te"
    if not spec.layer_specs:  # a stage without decoder layers holds no layer to copy
        return None
    mtp = get_gpt_mtp_block_spec(config, spec, use_te, vp_stage=vp_stage)
    return mtp if use_te or mtp is None else substitute(mtp, {WrappedTorchNorm: RMSNorm})
