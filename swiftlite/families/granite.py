"""Granite 3: LLaMA with constant factors on embeddings, attention scores, residuals and logits."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, MULTIPLIERS, REFUSE_OUTPUT_BIAS, decoder
from swiftlite.families.records import Family

FAMILY = Family(
    "granite",
    architectures=("GraniteForCausalLM",),
    config=GPT_CONFIG,
    patches=(REFUSE_OUTPUT_BIAS, *MULTIPLIERS),
    blocks=("multipliers",),
    weights=decoder(ATTENTION, MLP),
)
