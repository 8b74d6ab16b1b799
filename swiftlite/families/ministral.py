"""Ministral (8B, 2410): Mistral whose layers may have windows each by its kind."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder
from swiftlite.families.records import Family
from swiftlite.families.windows import everywhere, windowed

FAMILY = Family(
    "ministral",
    architectures=("MinistralForCausalLM",),
    config=windowed(GPT_CONFIG, everywhere, default=4096),
    weights=decoder(ATTENTION, MLP),
)
