"""Granite MoE: Granite's multipliers; experts of a layer in two tensors, a softmax router that normalises its choice."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS_HAVE_THE_WIDTH,
    GPT_CONFIG,
    MOE,
    MULTIPLIERS,
    REFUSE_OUTPUT_BIAS,
    constant,
    decoder,
    gated_mlp,
    router,
)
from swiftlite.families.records import Family
from swiftlite.weights.rule import Fused

_HF = "{layer}.block_sparse_moe"
_EXPERT = f"{_HF}.experts.{{expert}}"
EXPERTS = (
    *router(f"{_HF}.router.layer"),
    *gated_mlp("{layer}.mlp.experts.experts", _EXPERT, "moe_ffn", MOE),
)
FUSED = (
    Fused(f"{_HF}.input_linear.weight", (f"{_EXPERT}.gate_proj.weight", f"{_EXPERT}.up_proj.weight")),
    Fused(f"{_HF}.output_linear.weight", (f"{_EXPERT}.down_proj.weight",)),
)

FAMILY = Family(
    "granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        *MULTIPLIERS,
        EXPERTS_HAVE_THE_WIDTH,
        constant("moe_router_pre_softmax", False),
    ),
    blocks=("multipliers",),
    weights=decoder(ATTENTION, EXPERTS, fused=FUSED),
)
