"""Mixtral: Mistral with a softmax router in every layer, whose chosen weights are normalised."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS_HAVE_THE_WIDTH,
    GPT_CONFIG,
    MIXTRAL_EXPERTS,
    constant,
    decoder,
    rotary_base,
)
from swiftlite.families.records import Family
from swiftlite.families.windows import everywhere, windowed

FAMILY = Family(
    "mixtral",
    architectures=("MixtralForCausalLM",),
    config=windowed(GPT_CONFIG, everywhere, by_types=False),
    patches=(
        rotary_base(1000000),
        EXPERTS_HAVE_THE_WIDTH,
        constant("moe_router_pre_softmax", False),
    ),
    weights=decoder(ATTENTION, MIXTRAL_EXPERTS),
)
