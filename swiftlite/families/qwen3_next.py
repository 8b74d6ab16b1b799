"""Qwen3-Next: three of four layers are gated delta nets, the others have gated attention; norms multiply with 1 + weight,
except those inside the delta nets. What Qwen3.5 shares is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from swiftlite.families.blocks import (
    EXPERTS,
    MLP,
    PARTIAL_ROTARY_CONFIG,
    QK_NORM,
    REFUSE_OUTPUT_BIAS,
    ROUTER,
    SPARSE_STEP,
    constant,
    copy,
    decoder,
    layer_list,
)
from swiftlite.families.qwen2_moe import SHARED_EXPERT
from swiftlite.families.records import Config, ConfigRule, Derived, Family, Refuse, Rules
from swiftlite.weights.ops import GATED_QKV, Take
from swiftlite.weights.rule import Condition, Source, WeightRule

FULL = Condition("full attention", lambda m, kind: not kind.linear)
LINEAR = Condition("linear attention", lambda m, kind: kind.linear)
_SELF = "{layer}.self_attention"
_HF_SELF, _HF_NET = "{layer}.self_attn", "{layer}.linear_attn"
_KINDS = ("linear_attention", "full_attention")


def _only(when: Condition, *rules: WeightRule) -> tuple[WeightRule, ...]:
    return tuple(replace(rule, when=rule.when & when) for rule in rules)


def parts(mcore: str, hf: str, sizes: Sequence[tuple[str, str]], *dims: str | int, blocks: str | int = 1) -> Any:
    """The parts of one tensor as tensors of their own. sizes: (name of the part, its rows); the rest as of Take."""
    rows = tuple(size for _, size in sizes)
    source = (Source(hf, dims),)
    return tuple(WeightRule(f"{mcore}.{name}", source, Take(i, rows, blocks)) for i, (name, _) in enumerate(sizes))


QKV_PARTS = (("query", "linear_keys"), ("key", "linear_keys"), ("value", "linear_values"))


def delta_net(*projections: WeightRule) -> tuple[WeightRule, ...]:
    """A layer of linear attention around its input projections, of block gated_delta_net."""
    return _only(
        LINEAR,
        copy(f"{_SELF}.in_proj.layer_norm_weight", "{layer}.input_layernorm.weight", "hidden"),
        *projections,
        *parts(f"{_SELF}.conv1d.weight", f"{_HF_NET}.conv1d.weight", QKV_PARTS, "linear_qkv", 1, "conv_kernel"),
        copy(f"{_SELF}.dt_bias", f"{_HF_NET}.dt_bias", "value_heads"),
        copy(f"{_SELF}.A_log", f"{_HF_NET}.A_log", "value_heads"),
        copy(f"{_SELF}.out_norm.weight", f"{_HF_NET}.norm.weight", "value_dim"),
        copy(f"{_SELF}.out_proj.weight", f"{_HF_NET}.out_proj.weight", "hidden", "linear_values"),
    )


GATED_ATTENTION = _only(
    FULL,
    copy(f"{_SELF}.linear_qkv.layer_norm_weight", "{layer}.input_layernorm.weight", "hidden"),
    WeightRule(
        f"{_SELF}.linear_qkv.weight",
        (
            Source(f"{_HF_SELF}.q_proj.weight", ("gated_q_rows", "hidden")),
            Source(f"{_HF_SELF}.k_proj.weight", ("kv_rows", "hidden")),
            Source(f"{_HF_SELF}.v_proj.weight", ("kv_rows", "hidden")),
        ),
        GATED_QKV,
    ),
    copy(f"{_SELF}.linear_proj.weight", f"{_HF_SELF}.o_proj.weight", "hidden", "attn_cols"),
    *QK_NORM,
)
# One MTP block, whose layer has full attention.
MTP: dict[str, Any] = {
    "mtp": (
        copy("{layer}.enorm.weight", "mtp.pre_fc_norm_embedding.weight", "hidden"),
        copy("{layer}.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", "hidden"),
        copy("{layer}.eh_proj.weight", "mtp.fc.weight", "hidden", "hidden2"),
        copy("{layer}.final_layernorm.weight", "mtp.norm.weight", "hidden"),
    ),
    "mtp_layer": "mtp.layers.{index}",
}


def _linear_layers(config: Config) -> str:
    kinds = config.get("layer_types")
    if kinds:
        return layer_list(kind == "linear_attention" for kind in kinds)
    every = config.get("full_attention_interval", 4)
    return layer_list((layer + 1) % every != 0 for layer in range(config["num_hidden_layers"]))


HYBRID: Rules = (
    REFUSE_OUTPUT_BIAS,
    Refuse(
        lambda c: any(kind not in _KINDS for kind in c.get("layer_types") or ()),
        "layer_types {layer_types} may hold " + " and ".join(_KINDS),
    ),
    Refuse(
        lambda c: (c.get("mtp_num_hidden_layers") or 0) > 1,
        "mtp_num_hidden_layers {mtp_num_hidden_layers}: its tensors have names for one MTP block",
    ),
    ConfigRule("kv_channels", ("head_dim",), default=256, small=32),
    ConfigRule("partial_rotary_factor", ("partial_rotary_factor",), default=0.25),
    constant("layernorm_zero_centered_gamma", True),
    constant("qk_layernorm", True),
    constant("attention_output_gate", True),
    Derived("linear_attention_freq", _linear_layers),
    ConfigRule("linear_conv_kernel_dim", ("linear_conv_kernel_dim",), default=4),
    ConfigRule("linear_key_head_dim", ("linear_key_head_dim",), default=128, small=16),
    ConfigRule("linear_value_head_dim", ("linear_value_head_dim",), default=128, small=16),
    ConfigRule("linear_num_key_heads", ("linear_num_key_heads",), default=16, small=2),
    ConfigRule("linear_num_value_heads", ("linear_num_value_heads",), default=32, small=4),
)

FAMILY = Family(
    "qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    config=PARTIAL_ROTARY_CONFIG,
    patches=(*HYBRID, SPARSE_STEP, constant("use_shared_expert_gate", True)),
    blocks=("gated_delta_net",),
    mtp_key="mtp_num_hidden_layers",
    mtp_default=1,
    weights=decoder(
        delta_net(
            *parts(
                f"{_SELF}.in_proj.weight", f"{_HF_NET}.in_proj_qkvz.weight", (*QKV_PARTS, ("z", "linear_values")),
                "linear_qkvz", "hidden", blocks="key_heads",
            ),
            *parts(
                f"{_SELF}.in_proj.weight", f"{_HF_NET}.in_proj_ba.weight",
                (("beta", "value_heads"), ("alpha", "value_heads")), "value_heads2", "hidden", blocks="key_heads",
            ),
        ),
        GATED_ATTENTION, MLP, ROUTER, EXPERTS, SHARED_EXPERT, **MTP,
    ),
)  # fmt: skip
