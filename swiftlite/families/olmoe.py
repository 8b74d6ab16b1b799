"""OLMoE: q/k norm over all heads together, a softmax router in every layer whose weights stay as they are."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS,
    EXPERTS_HAVE_THE_WIDTH,
    FULL_QK_NORM,
    GPT_CONFIG,
    NORM_TOPK_DEFAULT_FALSE,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    constant,
    decoder,
)
from swiftlite.families.records import ConfigRule, Family, Refuse

FAMILY = Family(
    "olmoe",
    architectures=("OlmoeForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        Refuse(lambda c: c.get("clip_qkv") is not None, "clip_qkv {clip_qkv} cuts queries, keys and values off"),
        constant("qk_layernorm", True),
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
        EXPERTS_HAVE_THE_WIDTH,
        NORM_TOPK_DEFAULT_FALSE,
    ),
    blocks=("full_qk_norm",),
    weights=decoder(ATTENTION, FULL_QK_NORM, ROUTER, EXPERTS),
)
