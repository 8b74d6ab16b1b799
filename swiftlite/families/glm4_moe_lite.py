"""GLM-4.7-Flash: DeepSeek-V3's attention with GLM-4.5's experts."""

from __future__ import annotations

from swiftlite.families.blocks import (
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    GPT_CONFIG,
    MLA_CONFIG,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    dense_by_types,
)
from swiftlite.families.deepseek_v3 import WEIGHTS
from swiftlite.families.records import Family

FAMILY = Family(
    "glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    config=GPT_CONFIG,
    patches=(*MLA_CONFIG, *SIGMOID_ROUTER, dense_by_types(), EXPERT_BIAS_ON, *EXPERT_GROUPS, SHARED_WIDTH),
    blocks=("group_router",),
    weights=WEIGHTS,
)
