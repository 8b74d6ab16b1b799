"""Qwen3 MoE: q/k norm, softmax router, no shared experts, dense layers by sparse step."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SPARSE_STEP,
    STORED_TIED_HEAD,
    constant,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(*REFUSE_OUTPUT_BIAS, constant("qk_layernorm", True), *NORM_TOPK_DEFAULT_FALSE, *SPARSE_STEP),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + QK_NORM + MLP + ROUTER + EXPERTS,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "qwen3_moe",
                (
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-30B-A3B-Base",
                            "Qwen/Qwen3-30B-A3B",
                            "Qwen/Qwen3-235B-A22B",
                            "Qwen/Qwen3-30B-A3B-FP8",
                            "Qwen/Qwen3-235B-A22B-FP8",
                            ("swift/Qwen3-30B-A3B-AWQ", "cognitivecomputations/Qwen3-30B-A3B-AWQ"),
                            ("swift/Qwen3-235B-A22B-AWQ", "cognitivecomputations/Qwen3-235B-A22B-AWQ"),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-30B-A3B-Instruct-2507",
                            "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8",
                            "Qwen/Qwen3-235B-A22B-Instruct-2507",
                            "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8",
                            ("swift/Qwen3-235B-A22B-Instruct-2507-AWQ", None),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-Coder-30B-A3B-Instruct",
                            "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8",
                            "Qwen/Qwen3-Coder-480B-A35B-Instruct",
                            "Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8",
                            ("swift/Qwen3-Coder-480B-A35B-Instruct-AWQ", None),
                        ),
                        tags=("coding",),
                    ),
                ),
                template="qwen3",
                architectures=("Qwen3MoeForCausalLM",),
                requires=("transformers>=4.51",),
            ),
            ModelMeta(
                "qwen3_moe_thinking",
                (
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-30B-A3B-Thinking-2507",
                            "Qwen/Qwen3-30B-A3B-Thinking-2507-FP8",
                            "Qwen/Qwen3-235B-A22B-Thinking-2507",
                            "Qwen/Qwen3-235B-A22B-Thinking-2507-FP8",
                            ("swift/Qwen3-235B-A22B-Thinking-2507-AWQ", None),
                        ),
                    ),
                ),
                template="qwen3_thinking",
                architectures=("Qwen3MoeForCausalLM",),
                requires=("transformers>=4.51",),
            ),
        ),
    )
)
