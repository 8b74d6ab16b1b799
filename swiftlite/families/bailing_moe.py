"""Ling and Ring 2.0: q, k and v in one matrix, q/k norm, half rotary, sigmoid router with correction bias and groups."""

from __future__ import annotations

from swiftlite.families.blocks import (
    DENSE_FIRST,
    EXPERT_BIAS_ON,
    EXPERT_GROUPS,
    EXPERTS,
    HAS_QK_NORM,
    MLP,
    PARTIAL_ROTARY_CONFIG,
    ROUTER,
    SHARED_EXPERTS,
    SIGMOID_ROUTER,
    copy,
    decoder,
    expert_bias,
    fused_qkv,
    next_layer_mtp,
    shared_width,
)
from swiftlite.families.records import ConfigRule, Family, Refuse

EMBEDDING = "model.word_embeddings"
_SELF, _HF = "{layer}.self_attention", "{layer}.attention"
ATTENTION = (
    copy(f"{_SELF}.linear_qkv.layer_norm_weight", "{layer}.input_layernorm.weight", "hidden"),
    *fused_qkv(f"{_SELF}.linear_qkv", f"{_HF}.query_key_value"),
    copy(f"{_SELF}.q_layernorm.weight", f"{_HF}.query_layernorm.weight", "head_dim", when=HAS_QK_NORM),
    copy(f"{_SELF}.k_layernorm.weight", f"{_HF}.key_layernorm.weight", "head_dim", when=HAS_QK_NORM),
    copy(f"{_SELF}.linear_proj.weight", f"{_HF}.dense.weight", "hidden", "attn_cols"),
)
FAMILY = Family(
    "bailing_moe",
    architectures=("BailingMoeV2ForCausalLM",),
    config=PARTIAL_ROTARY_CONFIG,
    patches=(
        Refuse(lambda c: c.get("use_bias"), "use_bias true puts a bias on attention.dense, which Megatron's lacks"),
        Refuse(
            lambda c: c.get("score_function", "sigmoid") != "sigmoid",
            "score_function {score_function!r} is not sigmoid",
        ),
        ConfigRule("add_qkv_bias", ("use_qkv_bias",), default=False),
        *SIGMOID_ROUTER,
        DENSE_FIRST,
        EXPERT_BIAS_ON,
        *EXPERT_GROUPS,
        shared_width("num_shared_experts"),
    ),
    blocks=("group_router",),
    weights=decoder(
        ATTENTION,
        MLP,
        ROUTER,
        expert_bias("{layer}.mlp.gate.expert_bias"),
        EXPERTS,
        SHARED_EXPERTS,
        embedding=EMBEDDING,
        modules=((f"{EMBEDDING}.", "model.embed_tokens."),),
        **next_layer_mtp("final_layernorm", EMBEDDING),
    ),
)
