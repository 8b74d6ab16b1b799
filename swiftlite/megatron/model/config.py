"""A model's description and the settings of a run -> megatron-core's TransformerConfig.

`config_fields` gives the keywords as the arguments say them; what the machine cannot do is changed afterwards, by the
table in `backend`. megatron-core is imported inside functions, after `backend.setup()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftlite.arguments.description import Described
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Settings
from swiftlite.weights.shape import layer_pattern

if TYPE_CHECKING:
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import TransformerConfig

logger = get_logger()

# What no argument decides: every model here is a plain decoder with RMSNorm, trained with variable-length batches.
FIXED: Mapping[str, object] = {
    "normalization": "RMSNorm",
    "deallocate_pipeline_outputs": True,
    "persist_layer_norm": True,
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    "cpu_offloading_weights": True,
}

Rule = Callable[[Any], object]

# TransformerConfig field <- argument of another name or another form. Fields of the same name need no row.
RULES: Mapping[str, Rule] = {
    "num_moe_experts": lambda a: a.num_experts,
    "layernorm_epsilon": lambda a: a.norm_epsilon,
    "add_bias_linear": lambda a: not a.disable_bias_linear,
    "gated_linear_unit": lambda a: a.swiglu,
    "activation_func": lambda a: activation(a.activation) if a.swiglu else torch.nn.functional.gelu,
    # Of GELU by tanh there is no fused form; --bias_swiglu_fusion stands for the others, too.
    "bias_activation_fusion": lambda a: a.bias_swiglu_fusion and a.activation != "gelu_pytorch_tanh",
    # Of experts with biases there is none, either.
    "bias_dropout_fusion": lambda a: a.bias_dropout_fusion and (a.disable_bias_linear or not a.num_experts),
    "window_size": lambda a: None if a.window_size is None else (a.window_size, 0),
    "window_attn_skip_freq": lambda a: layers_of(a.window_attn_skip_freq, a),
    "no_rope_freq": lambda a: layers_of(a.no_rope_freq, a),
    "linear_attention_freq": lambda a: layers_of(a.linear_attention_freq, a),
    "perform_initialization": lambda a: getattr(a, "perform_initialization", False),
    # Always the list, also where all entries are 1: it decides whether a checkpoint's layers are stacked.
    "moe_layer_freq": lambda a: a.moe_layer_pattern if a.num_experts else None,
    "moe_shared_expert_gate": lambda a: a.use_shared_expert_gate,
    # Other routers with a bias (ernie) keep it in a block of their own: megatron-core allows it with sigmoid only.
    "moe_router_enable_expert_bias": lambda a: (
        a.moe_router_enable_expert_bias and a.moe_router_score_function == "sigmoid"
    ),
    "moe_router_load_balancing_type": lambda a: a.moe_router_load_balancing_type,
    "moe_grouped_gemm": lambda a: bool(a.num_experts) if a.moe_grouped_gemm is None else a.moe_grouped_gemm,
    "kv_channels": lambda a: a.kv_channels or a.hidden_size // a.num_attention_heads,
    "expert_tensor_parallel_size": lambda a: a.expert_tensor_parallel_size or a.tensor_model_parallel_size,
    "num_layers_in_first_pipeline_stage": lambda a: a.decoder_first_pipeline_num_layers,
    "num_layers_in_last_pipeline_stage": lambda a: a.decoder_last_pipeline_num_layers,
    "virtual_pipeline_model_parallel_size": lambda a: virtual_stages(a),
    # Between two stages of an interleaved pipeline several messages travel at once; batched ones would be mixed up.
    "overlap_p2p_comm": lambda a: virtual_stages(a) is not None,
    "batch_p2p_comm": lambda a: virtual_stages(a) is None,
    "microbatch_group_size_per_vp_stage": lambda a: a.pipeline_model_parallel_size,
    "bf16": lambda a: torch_dtype(a) == torch.bfloat16,
    "fp16": lambda a: torch_dtype(a) == torch.float16,
    "params_dtype": lambda a: torch_dtype(a),
    "pipeline_dtype": lambda a: torch_dtype(a),
    "autocast_dtype": lambda a: torch_dtype(a),
    "attention_backend": lambda a: attention_backend(a.attention_backend),
    "fp8": lambda a: a.fp8_format,
}

# The same for models with multi-latent attention.
MLA_RULES: Mapping[str, Rule] = {
    "q_lora_rank": lambda a: a.q_lora_rank,
    # Latent norms exist in every MLA model; megatron-core ties them to this switch.
    "qk_layernorm": lambda a: True,
    # The types with a factor on cos and sin, for which megatron-core has its 'yarn' only.
    "rope_type": lambda a: "yarn" if a.rope_type in ("yarn", "longrope") else "rope",
    # Only the softmax scale reads these: the frequencies come from transformers' own functions.
    "rotary_scaling_factor": lambda a: (a.rope_scaling or {}).get("factor") or 1.0,
    "mscale": lambda a: (a.rope_scaling or {}).get("mscale") or 1.0,
    "mscale_all_dim": lambda a: (a.rope_scaling or {}).get("mscale_all_dim") or 0.0,
    "apply_rope_fusion": lambda a: False,
}
# None is their value there, not "take the default".
_MAY_BE_NONE = ("q_lora_rank",)


def torch_dtype(args: MegatronArguments) -> torch.dtype:
    """dtype of the weights, float32 where nothing was said."""
    dtype = args.torch_dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    return torch.float32 if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))


def layers_of(pattern: str | None, args: Described) -> list[int] | None:
    """1 per layer that a pattern marks, 0 per other layer; None for no pattern."""
    return None if pattern is None else [int(marked) for marked in layer_pattern(pattern, args.num_layers)]


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function on the gate of a gated MLP: 'silu', 'gelu_pytorch_tanh' or 'quick_gelu'."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    functions = {"silu": torch.nn.functional.silu, "quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh}
    return functions[name]  # type: ignore[no-any-return]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with its usual approximation by tanh."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def virtual_stages(args: MegatronArguments) -> int | None:
    stages = args.num_virtual_stages_per_pipeline_rank
    return stages if stages and stages > 1 else None


def attention_backend(name: str | None) -> AttnBackend:
    from megatron.core.transformer.enums import AttnBackend

    return AttnBackend[name or "auto"]


def config_class(args: MegatronArguments) -> type:
    """TransformerConfig, or MLATransformerConfig for multi-latent attention."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    chosen: type = MLATransformerConfig if args.description.multi_latent_attention else TransformerConfig
    return chosen


def config_fields(args: MegatronArguments) -> Settings:
    """Keywords of `config_class(args)` as the arguments say them, before this machine has its say.

    Fields whose argument is None are absent: megatron-core's default holds.
    """
    backend.setup()
    both = Described(args.description, args)
    known = {f.name for f in dataclasses.fields(config_class(args)) if f.init}
    rules: dict[str, Rule] = {**RULES, **(MLA_RULES if both.multi_latent_attention else {})}
    fields: Settings = {k: v for k, v in FIXED.items() if k in known}
    for name in sorted(known):
        if name in rules:
            value = rules[name](both)
        elif name in FIXED:
            continue
        else:
            value = getattr(both, name, None)
        if value is not None or (name in _MAY_BE_NONE and name in rules):
            fields[name] = value
    if both.multi_latent_attention:
        fields["num_query_groups"] = both.num_attention_heads
        fields.pop("kv_channels", None)
    return fields


def to_transformer_config(args: MegatronArguments, **overrides: object) -> TransformerConfig:
    """The TransformerConfig (or MLATransformerConfig) that a model is built with on this machine.

    Args: overrides: fields that a caller sets over everything else.
    Raises: ConfigError if megatron-core refuses the combination.
    """
    fields, changes = backend.adjust_config(config_fields(args))
    for change in changes:
        logger.debug("%s = %s: %s", change.field, change.value, change.reason)
    fields.update(overrides)
    known = {f.name for f in dataclasses.fields(config_class(args)) if f.init}
    try:
        return config_class(args)(**{name: value for name, value in fields.items() if name in known})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses this combination of settings: {error}") from error
