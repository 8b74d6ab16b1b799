"""dots.llm1: q/k norm, sigmoid router with correction bias, shared experts, dense first layers."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    DENSE_FIRST_EVERY,
    EMBED,
    EXPERT_BIAS_ON,
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
    STORED_TIED_HEAD,
    constant,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "dots1",
        architectures=("Dots1ForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(
                *REFUSE_OUTPUT_BIAS,
                constant("qk_layernorm", True),
                *SIGMOID_ROUTER,
                *DENSE_FIRST_EVERY,
                *EXPERT_BIAS_ON,
                *SHARED_WIDTH,
                *SEQ_AUX_LOSS,
            ),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + QK_NORM + MLP + ROUTER + ROUTER_BIAS + EXPERTS + SHARED_EXPERTS,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "dots1",
                (
                    ModelGroup(
                        ids(
                            "rednote-hilab/dots.llm1.base",
                            "rednote-hilab/dots.llm1.inst",
                        ),
                    ),
                ),
                template="dots1",
                architectures=("Dots1ForCausalLM",),
                requires=("transformers>=4.53",),
            ),
        ),
    )
)
