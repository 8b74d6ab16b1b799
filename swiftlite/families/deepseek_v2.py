"""DeepSeek-V2: MLA, softmax router that ranks expert groups by their best score."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    DENSE_FIRST_EVERY,
    EMBED,
    EXPERTS,
    GPT_CONFIG,
    MLA_ATTENTION,
    MLA_CONFIG,
    MLP,
    ROUTER,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    STORED_TIED_HEAD,
    Config,
    constant,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import Derived, McoreMeta
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

# Only topk_method group_limited_greedy limits the choice to groups.
GROUPS = (
    Derived("moe_router_num_groups", lambda c: c["n_group"] if _grouped(c) else None),
    Derived("moe_router_group_topk", lambda c: c["topk_group"] if _grouped(c) else None),
)


def _grouped(config: Config) -> bool:
    return config.get("topk_method") == "group_limited_greedy" and (config.get("n_group") or 1) > 1


register_family(
    Family(
        "deepseek_v2",
        architectures=("DeepseekV2ForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(
                *MLA_CONFIG,
                constant("moe_router_pre_softmax", True),
                *DENSE_FIRST_EVERY,
                *GROUPS,
                *SHARED_WIDTH,
                *SEQ_AUX_LOSS,
            ),
            block="group_max_router",
            weights=WeightMap(
                top=EMBED,
                layer=MLA_ATTENTION + MLP + ROUTER + EXPERTS + SHARED_EXPERTS,
                duplicates=STORED_TIED_HEAD,
            ),
        ),
        models=(
            ModelMeta(
                "deepseek_v2",
                (
                    ModelGroup(
                        ids(
                            "deepseek-ai/DeepSeek-Coder-V2-Instruct",
                            "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
                            "deepseek-ai/DeepSeek-Coder-V2-Base",
                            "deepseek-ai/DeepSeek-Coder-V2-Lite-Base",
                            "deepseek-ai/DeepSeek-V2-Lite",
                            "deepseek-ai/DeepSeek-V2-Lite-Chat",
                            "deepseek-ai/DeepSeek-V2",
                            "deepseek-ai/DeepSeek-V2-Chat",
                        ),
                    ),
                ),
                template="deepseek",
                architectures=("DeepseekV2ForCausalLM",),
                model_arch="deepseek_v2",
                requires=("transformers>=4.39.3",),
            ),
        ),
    )
)
