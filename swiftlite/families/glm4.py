"""GLM-4-0414 and GLM-Z1: four norms a layer, interleaved rotation of half a head, gate and up stored as one matrix."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    FUSED_MLP,
    MLP_NORM,
    PARTIAL_ROTARY_CONFIG,
    constant,
    decoder,
    post_norms,
)
from swiftlite.families.records import ConfigRule, Family

FAMILY = Family(
    "glm4",
    architectures=("Glm4ForCausalLM",),
    wrappers={"Glm4vForConditionalGeneration": ("glm4v_text",)},
    config=PARTIAL_ROTARY_CONFIG,
    patches=(
        ConfigRule("add_qkv_bias", ("attention_bias",), default=True),
        ConfigRule("kv_channels", ("head_dim",), default=128),
        ConfigRule("partial_rotary_factor", ("partial_rotary_factor",), default=0.5),
        constant("rotary_interleaved", True),
    ),
    blocks=("post_norms",),
    weights=decoder(ATTENTION, MLP_NORM, FUSED_MLP, post_norms("post_self_attn_layernorm", "post_mlp_layernorm")),
)
