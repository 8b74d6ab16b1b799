"""Mixtral: Mistral with a softmax router in every layer, whose chosen weights are normalised."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    GPT_CONFIG,
    MOE,
    constant,
    copy,
    decoder,
    gated_mlp,
    rotary_base,
)
from swiftlite.families.records import Derived, Family
from swiftlite.families.windows import everywhere, windowed

EXPERTS = (
    copy("{layer}.pre_mlp_layernorm.weight", "{layer}.post_attention_layernorm.weight", "hidden", when=MOE),
    copy("{layer}.mlp.router.weight", "{layer}.block_sparse_moe.gate.weight", "experts", "hidden", when=MOE),
    *gated_mlp(
        "{layer}.mlp.experts.experts", "{layer}.block_sparse_moe.experts.{expert}", "moe_ffn", MOE, "w1", "w3", "w2"
    ),
)

FAMILY = Family(
    "mixtral",
    architectures=("MixtralForCausalLM",),
    config=windowed(GPT_CONFIG, everywhere, by_types=False),
    patches=(
        rotary_base(1000000),
        Derived("moe_ffn_hidden_size", lambda c: c["intermediate_size"]),
        constant("moe_router_pre_softmax", False),
    ),
    weights=decoder(ATTENTION, EXPERTS),
)
