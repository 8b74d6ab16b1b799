"""Seed-OSS: LLaMA with biases on q, k and v and explicit head dimensions."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder
from swiftlite.families.records import ConfigRule, Family, Refuse

FAMILY = Family(
    "seed_oss",
    architectures=("SeedOssForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        Refuse(
            lambda c: c.get("attention_out_bias"),
            "attention_out_bias true puts a bias on o_proj, which Megatron's attention does not have",
        ),
        ConfigRule("kv_channels", ("head_dim",), default=128),
        ConfigRule("add_qkv_bias", ("attention_bias",), default=True),
        ConfigRule("hidden_dropout", ("residual_dropout",)),
    ),
    weights=decoder(ATTENTION, MLP),
)
