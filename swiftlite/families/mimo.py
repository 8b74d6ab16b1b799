"""MiMo: Qwen2 with explicit head_dim and multi-token-prediction blocks of its own naming."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    GPT_CONFIG,
    MLP,
    STORED_TIED_HEAD,
    constant,
    copy,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.ops import SWAP_HALVES
from swiftlite.weights.rule import Source, WeightMap, WeightRule

# Hugging Face feeds [hidden, embedding] to input_proj, Megatron [embedding, hidden] to eh_proj.
MTP = (
    copy("{layer}.enorm.weight", "{layer}.token_layernorm.weight", "hidden"),
    copy("{layer}.hnorm.weight", "{layer}.hidden_layernorm.weight", "hidden"),
    WeightRule("{layer}.eh_proj.weight", (Source("{layer}.input_proj.weight", ("hidden", "hidden2")),), SWAP_HALVES),
    copy("{layer}.final_layernorm.weight", "{layer}.final_layernorm.weight", "hidden"),
)

register_family(
    Family(
        "mimo",
        architectures=("MiMoForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(constant("add_qkv_bias", True),),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + MLP,
                duplicates=STORED_TIED_HEAD,
                mtp=MTP,
                mtp_layer="model.mtp_layers.{index}",
            ),
        ),
        models=(
            ModelMeta(
                "mimo",
                (
                    ModelGroup(
                        ids(
                            "XiaomiMiMo/MiMo-7B-Base",
                            "XiaomiMiMo/MiMo-7B-SFT",
                            "XiaomiMiMo/MiMo-7B-RL-Zero",
                            "XiaomiMiMo/MiMo-7B-RL",
                        ),
                    ),
                ),
                template="qwen",
                architectures=("MiMoForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.37",),
            ),
            ModelMeta(
                "mimo_rl",
                (
                    ModelGroup(
                        ids(
                            "XiaomiMiMo/MiMo-7B-RL-0530",
                        ),
                    ),
                ),
                template="mimo_rl",
                architectures=("MiMoForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.37",),
            ),
        ),
    )
)
