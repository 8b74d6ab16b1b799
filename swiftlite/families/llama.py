"""LLaMA and the many models of its architecture: grouped-query attention, no biases, no q/k norm."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, REFUSE_OUTPUT_BIAS, decoder
from swiftlite.families.records import Family

FAMILY = Family(
    "llama",
    architectures=("LlamaForCausalLM",),
    config=GPT_CONFIG,
    patches=(REFUSE_OUTPUT_BIAS,),
    weights=decoder(ATTENTION, MLP),
)
