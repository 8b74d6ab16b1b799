"""Qwen3 MoE: q/k norm, softmax router, no shared experts, dense layers by sparse step."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SPARSE_STEP,
    constant,
    decoder,
)
from swiftlite.families.records import Family

FAMILY = Family(
    "qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=GPT_CONFIG,
    patches=(REFUSE_OUTPUT_BIAS, constant("qk_layernorm", True), NORM_TOPK_DEFAULT_FALSE, SPARSE_STEP),
    weights=decoder(ATTENTION, QK_NORM, MLP, ROUTER, EXPERTS),
)
