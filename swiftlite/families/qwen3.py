"""Qwen3 dense: q/k norm over explicit head dimensions, no biases."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, QK_NORM, REFUSE_OUTPUT_BIAS, constant, decoder
from swiftlite.families.records import Family

FAMILY = Family(
    "qwen3",
    architectures=("Qwen3ForCausalLM",),
    wrappers={"Qwen3VLForConditionalGeneration": ("qwen3_vl_text",)},
    config=GPT_CONFIG,
    patches=(REFUSE_OUTPUT_BIAS, constant("qk_layernorm", True)),
    weights=decoder(ATTENTION, QK_NORM, MLP),
)
