"""DeepSeek-V3, R1 and Moonlight: MLA, sigmoid router with correction bias and expert groups, MTP."""

from __future__ import annotations

from swiftlite.families.blocks import (
    DENSE_FIRST_EVERY,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    GPT_CONFIG,
    MLA_ATTENTION,
    MLA_CONFIG,
    MLP,
    ROUTER,
    ROUTER_BIAS,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    decoder,
    next_layer_mtp,
)
from swiftlite.families.records import Family

LAYER = (MLA_ATTENTION, MLP, ROUTER, ROUTER_BIAS, EXPERTS, SHARED_EXPERTS)
WEIGHTS = decoder(*LAYER, **next_layer_mtp())

FAMILY = Family(
    "deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    wrappers=dict.fromkeys(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"), ("kimi_k2", "deepseek_v3")
    ),
    aliases={"kimi_k2": "deepseek_v3"},
    config=GPT_CONFIG,
    patches=(
        *MLA_CONFIG,
        *SIGMOID_ROUTER,
        DENSE_FIRST_EVERY,
        EXPERT_BIAS_ON,
        *EXPERT_GROUPS,
        SHARED_WIDTH,
        SEQ_AUX_LOSS,
    ),
    blocks=("group_router",),
    weights=WEIGHTS,
)
