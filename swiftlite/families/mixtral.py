"""Mixtral: Mistral with a softmax router in every layer, whose chosen weights are normalised."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    GPT_CONFIG,
    MIXTRAL_EXPERTS,
    constant,
    decoder,
    rotary_base,
)
from swiftlite.families.records import Derived, Family
from swiftlite.families.windows import everywhere, windowed

FAMILY = Family(
    "mixtral",
    architectures=("MixtralForCausalLM",),
    config=windowed(GPT_CONFIG, everywhere, by_types=False),
    patches=(
        rotary_base(1000000),
        Derived("moe_ffn_hidden_size", lambda c: c["intermediate_size"]),
        constant("moe_router_pre_softmax", False),
    ),
    weights=decoder(ATTENTION, MIXTRAL_EXPERTS),
)
