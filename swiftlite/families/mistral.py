"""Mistral with full attention (7B v0.2 and v0.3, Nemo, Large, Small 24B): LLaMA with explicit head dimensions."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder, refuse_window
from swiftlite.families.records import Family

FAMILY = Family(
    "mistral",
    architectures=("MistralForCausalLM",),
    config=GPT_CONFIG,
    patches=(refuse_window(4096),),
    weights=decoder(ATTENTION, MLP),
)
