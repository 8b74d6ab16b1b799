"""Qwen2 and Qwen2.5: LLaMA with a bias on q, k and v that no config key mentions."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, constant, decoder
from swiftlite.families.records import Family

FAMILY = Family(
    "qwen2",
    architectures=("Qwen2ForCausalLM",),
    wrappers={"Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl_text", "qwen2_5_vl")},
    config=GPT_CONFIG,
    patches=(constant("add_qkv_bias", True),),
    weights=decoder(ATTENTION, MLP),
)
