"""Qwen3.5 and 3.6 with experts, which the published files keep in one tensor for all of a layer."""

from __future__ import annotations

from swiftlite.families.blocks import EXPERTS, PARTIAL_ROTARY_CONFIG, ROUTER, constant, decoder, fused_experts
from swiftlite.families.qwen2_moe import SHARED_EXPERT
from swiftlite.families.qwen3_5 import DELTA_NET
from swiftlite.families.qwen3_next import GATED_ATTENTION, HYBRID, MTP
from swiftlite.families.records import ConfigRule, Family

FAMILY = Family(
    "qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM",),
    wrappers={"Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe_text",)},
    config=PARTIAL_ROTARY_CONFIG,
    patches=(
        *HYBRID,
        ConfigRule("ffn_hidden_size", ("moe_intermediate_size",)),
        constant("moe_router_pre_softmax", False),
        constant("use_shared_expert_gate", True),
    ),
    blocks=("gated_delta_net",),
    mtp_key="mtp_num_hidden_layers",
    mtp_default=1,
    weights=decoder(DELTA_NET, GATED_ATTENTION, ROUTER, EXPERTS, SHARED_EXPERT, fused=fused_experts(), **MTP),
)
