"""MiMo: Qwen2 with explicit head_dim and multi-token-prediction blocks of its own naming."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, constant, copy, decoder
from swiftlite.families.records import Family
from swiftlite.weights.ops import SWAP_HALVES
from swiftlite.weights.rule import Source, WeightRule

# Hugging Face feeds [hidden, embedding] to input_proj, Megatron [embedding, hidden] to eh_proj.
MTP = (
    copy("{layer}.enorm.weight", "{layer}.token_layernorm.weight", "hidden"),
    copy("{layer}.hnorm.weight", "{layer}.hidden_layernorm.weight", "hidden"),
    WeightRule("{layer}.eh_proj.weight", (Source("{layer}.input_proj.weight", ("hidden", "hidden2")),), SWAP_HALVES),
    copy("{layer}.final_layernorm.weight", "{layer}.final_layernorm.weight", "hidden"),
)

FAMILY = Family(
    "mimo",
    architectures=("MiMoForCausalLM",),
    config=GPT_CONFIG,
    patches=(constant("add_qkv_bias", True),),
    weights=decoder(ATTENTION, MLP, mtp=MTP, mtp_layer="model.mtp_layers.{index}"),
)
