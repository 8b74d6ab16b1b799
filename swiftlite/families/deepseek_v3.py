"""DeepSeek-V3, R1 and Moonlight: MLA, sigmoid router with correction bias and expert groups, MTP."""

from __future__ import annotations

from swiftlite.families.blocks import (
    DENSE_FIRST_EVERY,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    GPT_CONFIG,
    MLA_ATTENTION,
    MLA_CONFIG,
    MLP,
    NEXT_LAYER_MTP,
    ROUTER,
    ROUTER_BIAS,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    decoder,
)
from swiftlite.families.records import Family, Refuse

# Hugging Face ranks a group by the sum of its two best scores, Megatron by that of its best topk // topk_group.
GROUP_RATIO = Refuse(
    lambda c: (c.get("n_group") or 1) > 1 and c["num_experts_per_tok"] // c["topk_group"] != 2,
    "num_experts_per_tok {num_experts_per_tok} and topk_group {topk_group} make Megatron rank expert groups by another "
    "number of scores than the model's two",
)

FAMILY = Family(
    "deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    wrappers=dict.fromkeys(
        ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration"), ("kimi_k2", "deepseek_v3")
    ),
    aliases={"kimi_k2": "deepseek_v3"},
    config=GPT_CONFIG,
    patches=(
        *MLA_CONFIG,
        *SIGMOID_ROUTER,
        DENSE_FIRST_EVERY,
        EXPERT_BIAS_ON,
        GROUP_RATIO,
        *EXPERT_GROUPS,
        SHARED_WIDTH,
        SEQ_AUX_LOSS,
    ),
    weights=decoder(MLA_ATTENTION, MLP, ROUTER, ROUTER_BIAS, EXPERTS, SHARED_EXPERTS, **NEXT_LAYER_MTP),
)
