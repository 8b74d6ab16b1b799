"""Mistral: LLaMA with explicit head dimensions; the first (7B v0.1) with a window in all layers."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder
from swiftlite.families.records import Family
from swiftlite.families.windows import everywhere, windowed

FAMILY = Family(
    "mistral",
    architectures=("MistralForCausalLM",),
    wrappers={"Mistral3ForConditionalGeneration": ("mistral",)},
    config=windowed(GPT_CONFIG, everywhere, default=4096, by_types=False),
    weights=decoder(ATTENTION, MLP),
)
