"""GLM-4.5: qkv bias, half rotary, sigmoid router with correction bias, shared experts, dense first layers, MTP."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST,
    EMBED,
    EXPERT_BIAS_ON,
    EXPERTS,
    MLP,
    NEXT_LAYER_MTP,
    NEXT_LAYER_MTP_COPIES,
    PARTIAL_ROTARY_CONFIG,
    QK_NORM,
    ROUTER,
    ROUTER_BIAS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    STORED_TIED_HEAD,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import ConfigRule, McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        mcore=McoreMeta(
            config=PARTIAL_ROTARY_CONFIG,
            patches=(
                *SIGMOID_ROUTER,
                ConfigRule("partial_rotary_factor", ("partial_rotary_factor",), default=0.5),
                *DENSE_FIRST,
                *EXPERT_BIAS_ON,
                *SHARED_WIDTH,
            ),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + QK_NORM + MLP + ROUTER + ROUTER_BIAS + EXPERTS + SHARED_EXPERTS,
                duplicates=STORED_TIED_HEAD + NEXT_LAYER_MTP_COPIES,
                mtp=NEXT_LAYER_MTP,
                mtp_layer="model.layers.{number}",
            ),
        ),
        models=(
            ModelMeta(
                "glm4_5",
                (
                    ModelGroup(
                        ids(
                            ("ZhipuAI/GLM-4.5-Air-Base", "zai-org/GLM-4.5-Air-Base"),
                            ("ZhipuAI/GLM-4.5-Air", "zai-org/GLM-4.5-Air"),
                            ("ZhipuAI/GLM-4.5-Air-FP8", "zai-org/GLM-4.5-Air-FP8"),
                            ("ZhipuAI/GLM-4.5-Base", "zai-org/GLM-4.5-Base"),
                            ("ZhipuAI/GLM-4.5", "zai-org/GLM-4.5"),
                            ("ZhipuAI/GLM-4.5-FP8", "zai-org/GLM-4.5-FP8"),
                        ),
                    ),
                ),
                template="glm4_5",
                architectures=("Glm4MoeForCausalLM",),
                requires=("transformers>=4.54",),
            ),
        ),
    )
)
