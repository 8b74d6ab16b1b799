"""Qwen3 MoE: q/k norm, softmax router, no shared experts, dense layers by sparse step.

As the text part of Qwen3-VL it keeps a layer's experts in one tensor and always normalises their weights.
"""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SPARSE_STEP,
    constant,
    decoder,
    fused_experts,
)
from swiftlite.families.records import Config, Derived, Family

_PART = "qwen3_vl_moe_text"


def _keeps_scores(config: Config) -> bool:
    """Whether the scores of the chosen experts stay as the softmax over all gives them."""
    return config.get("model_type") != _PART and not config.get("norm_topk_prob", False)


FAMILY = Family(
    "qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    wrappers={"Qwen3VLMoeForConditionalGeneration": (_PART,)},
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        constant("qk_layernorm", True),
        Derived("moe_router_pre_softmax", _keeps_scores),
        SPARSE_STEP,
    ),
    weights=decoder(ATTENTION, QK_NORM, MLP, ROUTER, EXPERTS, fused=fused_experts(transposed=True, of_part=True)),
)
