"""DeepSeek-V3, R1 and Moonlight: MLA, sigmoid router with correction bias and expert groups, MTP."""

from __future__ import annotations

from swiftlite.families import register_family
from swiftlite.families.blocks import (
    DENSE_FIRST_EVERY,
    EMBED,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    GPT_CONFIG,
    MLA_ATTENTION,
    MLA_CONFIG,
    MLP,
    NEXT_LAYER_MTP,
    NEXT_LAYER_MTP_COPIES,
    ROUTER,
    ROUTER_BIAS,
    SEQ_AUX_LOSS,
    SHARED_EXPERTS,
    SHARED_WIDTH,
    SIGMOID_ROUTER,
    STORED_TIED_HEAD,
)
from swiftlite.families.meta.family import Family
from swiftlite.families.meta.mcore import McoreMeta, Refuse
from swiftlite.families.meta.model import ModelGroup, ModelMeta, ids
from swiftlite.weights.rule import WeightMap

# Hugging Face ranks a group by the sum of its two best scores, Megatron by that of its best topk // topk_group.
GROUP_RATIO = Refuse(
    lambda c: (
        f"num_experts_per_tok {c['num_experts_per_tok']} and topk_group {c['topk_group']} make Megatron rank expert "
        "groups by another number of scores than the model's two"
        if (c.get("n_group") or 1) > 1 and c["num_experts_per_tok"] // c["topk_group"] != 2
        else None
    )
)

register_family(
    Family(
        "deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        mcore=McoreMeta(
            config=GPT_CONFIG,
            patches=(
                *MLA_CONFIG,
                *SIGMOID_ROUTER,
                *DENSE_FIRST_EVERY,
                *EXPERT_BIAS_ON,
                GROUP_RATIO,
                *EXPERT_GROUPS,
                *SHARED_WIDTH,
                *SEQ_AUX_LOSS,
            ),
            weights=WeightMap(
                top=EMBED,
                layer=MLA_ATTENTION + MLP + ROUTER + ROUTER_BIAS + EXPERTS + SHARED_EXPERTS,
                duplicates=STORED_TIED_HEAD + NEXT_LAYER_MTP_COPIES,
                mtp=NEXT_LAYER_MTP,
                mtp_layer="model.layers.{number}",
            ),
        ),
        models=(
            ModelMeta(
                "moonlight",
                (
                    ModelGroup(
                        ids(
                            "moonshotai/Moonlight-16B-A3B",
                            "moonshotai/Moonlight-16B-A3B-Instruct",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "moonshotai/Kimi-K2-Base",
                            "moonshotai/Kimi-K2-Instruct",
                        ),
                    ),
                ),
                template="moonlight",
                architectures=("DeepseekV3ForCausalLM",),
                model_arch="deepseek_v2",
                requires=("transformers<4.49",),
            ),
            ModelMeta(
                "deepseek_v2_5",
                (
                    ModelGroup(
                        ids(
                            "deepseek-ai/DeepSeek-V2.5",
                            "deepseek-ai/DeepSeek-V2.5-1210",
                            "deepseek-ai/DeepSeek-V3-Base",
                            "deepseek-ai/DeepSeek-V3",
                            "deepseek-ai/DeepSeek-V3-0324",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("cognitivecomputations/DeepSeek-V3-awq", "cognitivecomputations/DeepSeek-V3-AWQ"),
                            "cognitivecomputations/DeepSeek-V3-0324-AWQ",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "deepseek-ai/DeepSeek-Prover-V2-7B",
                            "deepseek-ai/DeepSeek-Prover-V2-671B",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "unsloth/DeepSeek-V3-bf16",
                            "unsloth/DeepSeek-V3-0324-BF16",
                            "unsloth/DeepSeek-Prover-V2-671B-BF16",
                        ),
                    ),
                ),
                template="deepseek_v2_5",
                architectures=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
                model_arch="deepseek_v2",
                requires=("transformers>=4.39.3",),
            ),
            ModelMeta(
                "deepseek_r1",
                (
                    ModelGroup(
                        ids(
                            "deepseek-ai/DeepSeek-R1",
                            "deepseek-ai/DeepSeek-R1-Zero",
                            "deepseek-ai/DeepSeek-R1-0528",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            ("cognitivecomputations/DeepSeek-R1-awq", "cognitivecomputations/DeepSeek-R1-AWQ"),
                            "cognitivecomputations/DeepSeek-R1-0528-AWQ",
                        ),
                    ),
                    ModelGroup(
                        ids(
                            "unsloth/DeepSeek-R1-BF16",
                            "unsloth/DeepSeek-R1-Zero-BF16",
                            "unsloth/DeepSeek-R1-0528-BF16",
                        ),
                    ),
                ),
                template="deepseek_r1",
                architectures=("DeepseekV3ForCausalLM",),
                model_arch="deepseek_v2",
                requires=("transformers>=4.39.3",),
            ),
        ),
    )
)
