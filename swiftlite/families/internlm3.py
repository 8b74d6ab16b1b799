"""InternLM3: LLaMA with explicit head_dim and dynamic rope."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder
from swiftlite.families.records import Family, Refuse

FAMILY = Family(
    "internlm3",
    architectures=("InternLM3ForCausalLM",),
    config=GPT_CONFIG,
    patches=(Refuse(lambda c: c.get("bias"), "bias true puts biases on o_proj and the MLP, which are not supported"),),
    weights=decoder(ATTENTION, MLP),
)
