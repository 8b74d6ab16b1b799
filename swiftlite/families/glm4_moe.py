"""GLM-4.5: qkv bias, half rotary, sigmoid router with correction bias, shared experts, dense first layers, MTP."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    MLP,
    PARTIAL_ROTARY_CONFIG,
    QK_NORM,
    ROUTER,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    decoder,
    next_layer_mtp,
)
from swiftlite.families.records import ConfigRule, Family

FAMILY = Family(
    "glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    wrappers={"Glm4vMoeForConditionalGeneration": ("glm4v_moe_text",)},
    config=PARTIAL_ROTARY_CONFIG,
    patches=(
        *SIGMOID_ROUTER,
        ConfigRule("partial_rotary_factor", ("partial_rotary_factor",), default=0.5),
        DENSE_FIRST,
        EXPERT_BIAS_ON,
        *EXPERT_GROUPS,
        SHARED_WIDTH,
    ),
    blocks=("group_router",),
    weights=decoder(ATTENTION, QK_NORM, MLP, ROUTER, ROUTER_BIAS, EXPERTS, SHARED_EXPERTS, **next_layer_mtp()),
)
