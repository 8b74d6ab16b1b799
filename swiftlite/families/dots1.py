"""dots.llm1: q/k norm, sigmoid router with correction bias, shared experts, dense first layers."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST_EVERY,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    ROUTER_BIAS,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    constant,
    decoder,
)
from swiftlite.families.records import Family

FAMILY = Family(
    "dots1",
    architectures=("Dots1ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        constant("qk_layernorm", True),
        *SIGMOID_ROUTER,
        DENSE_FIRST_EVERY,
        EXPERT_BIAS_ON,
        *EXPERT_GROUPS,
        SHARED_WIDTH,
        SEQ_AUX_LOSS,
    ),
    blocks=("group_router",),
    weights=decoder(ATTENTION, QK_NORM, MLP, ROUTER, ROUTER_BIAS, EXPERTS, SHARED_EXPERTS),
)
