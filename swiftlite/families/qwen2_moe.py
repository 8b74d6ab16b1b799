"""Qwen2 MoE (Qwen1.5-MoE, Qwen2-57B-A14B): softmax router, one gated shared expert, qkv bias."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    NORM_TOPK_DEFAULT_FALSE,
    ROUTER,
    SHARED,
    SHARED_GATE,
    SPARSE_STEP,
    constant,
    copy,
    decoder,
    gated_mlp,
)
from swiftlite.families.records import Derived, Family

SHARED_EXPERT = (
    *gated_mlp("{layer}.mlp.shared_experts", "{layer}.mlp.shared_expert", "shared_ffn", SHARED),
    copy(
        "{layer}.mlp.shared_experts.gate_weight", "{layer}.mlp.shared_expert_gate.weight", 1, "hidden", when=SHARED_GATE
    ),
)

FAMILY = Family(
    "qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        Derived("add_qkv_bias", lambda c: c.get("qkv_bias", True)),
        NORM_TOPK_DEFAULT_FALSE,
        SPARSE_STEP,
        constant("use_shared_expert_gate", True),
    ),
    weights=decoder(ATTENTION, MLP, ROUTER, EXPERTS, SHARED_EXPERT),
)
