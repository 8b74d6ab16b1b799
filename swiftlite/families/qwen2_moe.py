"""Qwen2 MoE (Qwen1.5-MoE, Qwen2-57B-A14B): softmax router, one gated shared expert, qkv bias."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    ROUTER,
    SHARED,
    SHARED_GATE,
    SPARSE_STEP,
    STORED_TIED_HEAD,
    constant,
    copy,
    gated_mlp,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import Derived, McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

SHARED_EXPERT = (
    *gated_mlp("{layer}.mlp.shared_experts", "{layer}.mlp.shared_expert", "shared_ffn", SHARED),
    copy(
        "{layer}.mlp.shared_experts.gate_weight", "{layer}.mlp.shared_expert_gate.weight", 1, "hidden", when=SHARED_GATE
    ),
)

register_family(
    Family(
        "qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(
                Derived("add_qkv_bias", lambda c: c.get("qkv_bias", True)),
                *NORM_TOPK_DEFAULT_FALSE,
                *SPARSE_STEP,
                constant("use_shared_expert_gate", True),
            ),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + MLP + ROUTER + EXPERTS + SHARED_EXPERT,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "qwen2_moe",
                (
                    ModelGroup(
                        ids(
                            "Qwen/Qwen1.5-MoE-A2.7B-Chat",
                            "Qwen/Qwen1.5-MoE-A2.7B",
                            "Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "Qwen/Qwen2-57B-A14B-Instruct",
                            "Qwen/Qwen2-57B-A14B",
                            "Qwen/Qwen2-57B-A14B-Instruct-GPTQ-Int4",
                        ),
                    ),
                ),
                template="qwen",
                architectures=("Qwen2MoeForCausalLM",),
                requires=("transformers>=4.40",),
            ),
        ),
    )
)
