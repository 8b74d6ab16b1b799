"""InternLM3: LLaMA with explicit head_dim and dynamic rope."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    ATTENTION,
    EMBED,
    GPT_CONFIG,
    MLP,
    STORED_TIED_HEAD,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta, Refuse
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

register_family(
    Family(
        "internlm3",
        architectures=("InternLM3ForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(
                Refuse(
                    lambda c: (
                        "bias true puts biases on o_proj and the MLP, which are not supported"
                        if c.get("bias")
                        else None
                    )
                ),
            ),
            weights=WeightMap(
                top=EMBED,
                layer=ATTENTION + MLP,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "internlm3",
                (
                    ModelGroup(
                        ids(
                            ("Shanghai_AI_Laboratory/internlm3-8b-instruct", "internlm/internlm3-8b-instruct"),
                        ),
                    ),
                ),
                template="internlm2",
                architectures=("InternLM3ForCausalLM",),
                model_arch="llama",
                requires=("transformers>=4.48",),
            ),
        ),
    )
)
