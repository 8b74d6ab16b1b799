"""DeepSeek-MoE 16B: LLaMA attention, softmax router without normalisation, shared experts, dense first layers."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST_EVERY,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    decoder,
)
from swiftlite.families.records import Family

FAMILY = Family(
    "deepseek_moe",
    architectures=("DeepseekForCausalLM",),
    config=GPT_CONFIG,
    patches=(REFUSE_OUTPUT_BIAS, NORM_TOPK_DEFAULT_FALSE, DENSE_FIRST_EVERY, SHARED_WIDTH, SEQ_AUX_LOSS),
    weights=decoder(ATTENTION, MLP, ROUTER, EXPERTS, SHARED_EXPERTS),
)
