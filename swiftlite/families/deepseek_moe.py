"""DeepSeek-MoE 16B: LLaMA attention, softmax router without normalisation, shared experts, dense first layers."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST_EVERY,
    EMBED,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    STORED_TIED_HEAD,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "deepseek_moe",
        architectures=("DeepseekForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(*REFUSE_OUTPUT_BIAS, *NORM_TOPK_DEFAULT_FALSE, *DENSE_FIRST_EVERY, *SHARED_WIDTH, *SEQ_AUX_LOSS),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + MLP + ROUTER + EXPERTS + SHARED_EXPERTS,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "deepseek_moe",
                (
                    ModelGroup(
                        ids(
                            "deepseek-ai/deepseek-moe-16b-chat",
                            "deepseek-ai/deepseek-moe-16b-base",
                        ),
                    ),
                ),
                template="deepseek",
                architectures=("DeepseekForCausalLM",),
            ),
        ),
    )
)
