"""Qwen3 dense: q/k norm over explicit head dimensions, no biases."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    GPT_CONFIG,
    MLP,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    STORED_TIED_HEAD,
    constant,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "qwen3",
        architectures=("Qwen3ForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(*REFUSE_OUTPUT_BIAS, constant("qk_layernorm", True)),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + QK_NORM + MLP,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "qwen3",
                (
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-0.6B-Base",
                            "Qwen/Qwen3-1.7B-Base",
                            "Qwen/Qwen3-4B-Base",
                            "Qwen/Qwen3-8B-Base",
                            "Qwen/Qwen3-14B-Base",
                            "Qwen/Qwen3-0.6B",
                            "Qwen/Qwen3-1.7B",
                            "Qwen/Qwen3-4B",
                            "Qwen/Qwen3-8B",
                            "Qwen/Qwen3-14B",
                            "Qwen/Qwen3-32B",
                            "Qwen/Qwen3-0.6B-FP8",
                            "Qwen/Qwen3-1.7B-FP8",
                            "Qwen/Qwen3-4B-FP8",
                            "Qwen/Qwen3-8B-FP8",
                            "Qwen/Qwen3-14B-FP8",
                            "Qwen/Qwen3-32B-FP8",
                            "Qwen/Qwen3-4B-AWQ",
                            "Qwen/Qwen3-8B-AWQ",
                            "Qwen/Qwen3-14B-AWQ",
                            "Qwen/Qwen3-32B-AWQ",
                            ("swift/Qwen3-32B-AWQ", None),
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-4B-Instruct-2507",
                            "Qwen/Qwen3-4B-Instruct-2507-FP8",
                        ),
                    ),
                ),
                template="qwen3",
                architectures=("Qwen3ForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.51",),
            ),
            ModelMeta(
                "qwen3_thinking",
                (
                    ModelGroup(
                        ids(
                            "Qwen/Qwen3-4B-Thinking-2507",
                            "Qwen/Qwen3-4B-Thinking-2507-FP8",
                        ),
                    ),
                ),
                template="qwen3_thinking",
                architectures=("Qwen3ForCausalLM",),
                requires=("transformers>=4.51",),
            ),
        ),
    )
)
