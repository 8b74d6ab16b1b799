"""Phi-3, 3.5 and 4: Mistral whose files have q, k and v in one matrix and gate and up in another."""

from __future__ import annotations

from swiftlite.families.blocks import FUSED_MLP, MLP_NORM, PARTIAL_ROTARY_CONFIG, copy, decoder, fused_qkv
from swiftlite.families.records import ConfigRule, Family, Refuse
from swiftlite.families.windows import everywhere, windowed

ATTENTION = (
    copy("{layer}.self_attention.linear_qkv.layer_norm_weight", "{layer}.input_layernorm.weight", "hidden"),
    *fused_qkv("{layer}.self_attention.linear_qkv", "{layer}.self_attn.qkv_proj"),
    copy("{layer}.self_attention.linear_proj.weight", "{layer}.self_attn.o_proj.weight", "hidden", "attn_cols"),
)

FAMILY = Family(
    "phi3",
    architectures=("Phi3ForCausalLM",),
    config=windowed(PARTIAL_ROTARY_CONFIG, everywhere, by_types=False),
    patches=(
        Refuse(lambda c: c.get("attention_bias"), "attention_bias true: its class in transformers has no biases"),
        Refuse(
            lambda c: (c["rope_scaling"] or {}).get("rope_type", "longrope") != "longrope",
            "rope settings {rope_scaling}: this architecture's are 'default' or 'longrope'",
        ),
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
        ConfigRule("original_max_position_embeddings", ("original_max_position_embeddings",), default=4096),
    ),
    weights=decoder(ATTENTION, MLP_NORM, FUSED_MLP),
)
