"""Hy3: q/k norm, sigmoid router with correction bias, shared experts, dense first layer, MTP."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERT_BIAS_ON,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    SIGMOID_ROUTER,
    constant,
    decoder,
    dense_by_types,
    expert_bias,
    next_layer_mtp,
    rotary_base,
    router,
    shared_width,
)
from swiftlite.families.hunyuan_v1_moe import SHARED_MLP
from swiftlite.families.records import ConfigRule, Family

ROUTER = router("{layer}.mlp.router.gate", keep_dtype=True) + expert_bias("{layer}.mlp.expert_bias")

FAMILY = Family(
    "hy_v3",
    architectures=("HYV3ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        rotary_base(11158840),
        ConfigRule("kv_channels", ("head_dim",), default=128),
        constant("qk_layernorm", True),
        *SIGMOID_ROUTER,
        ConfigRule("moe_router_topk_scaling_factor", ("router_scaling_factor",), default=2.826),
        dense_by_types(),
        EXPERT_BIAS_ON,
        shared_width("num_shared_experts", default=1),
    ),
    weights=decoder(
        ATTENTION,
        QK_NORM,
        MLP,
        ROUTER,
        EXPERTS,
        SHARED_MLP,
        modules=((".shared_mlp.", ".shared_experts."),),
        **next_layer_mtp("final_layernorm"),
    ),
)
