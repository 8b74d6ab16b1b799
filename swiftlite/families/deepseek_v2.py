"""DeepSeek-V2: MLA, softmax router that ranks expert groups by their best score."""

from __future__ import annotations

from swiftlite.families.blocks import (
    DENSE_FIRST_EVERY,
    EXPERTS,
    GPT_CONFIG,
    MLA_ATTENTION,
    MLA_CONFIG,
    MLP,
    ROUTER,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SMALL_GROUPS,
    constant,
    decoder,
)
from swiftlite.families.records import Config, Derived, Family

# Only topk_method group_limited_greedy limits the choice to groups.
GROUPS = (
    Derived("moe_router_num_groups", lambda c: c["n_group"] if _grouped(c) else None, SMALL_GROUPS),
    Derived("moe_router_group_topk", lambda c: c["topk_group"] if _grouped(c) else None),
)


def _grouped(config: Config) -> bool:
    return config.get("topk_method") == "group_limited_greedy" and (config.get("n_group") or 1) > 1


FAMILY = Family(
    "deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        *MLA_CONFIG,
        constant("moe_router_pre_softmax", True),
        DENSE_FIRST_EVERY,
        *GROUPS,
        SHARED_WIDTH,
        SEQ_AUX_LOSS,
    ),
    blocks=("group_router",),
    weights=decoder(MLA_ATTENTION, MLP, ROUTER, EXPERTS, SHARED_EXPERTS),
)
