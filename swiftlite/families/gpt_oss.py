"""gpt-oss: learned sinks, a window in every second layer, biases everywhere, experts with clamped and shifted gates."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS_HAVE_THE_WIDTH,
    GPT_CONFIG,
    MOE,
    constant,
    copy,
    decoder,
    fused_experts,
    gated_mlp,
    rotary_base,
    router,
)
from swiftlite.families.records import ConfigRule, Family, Refuse
from swiftlite.families.windows import all_but_every, windowed
from swiftlite.weights.ops import CONCAT
from swiftlite.weights.rule import Source, WeightRule

_EXPERT = "{layer}.mlp.experts.{expert}"

SINKS = (
    copy("{layer}.self_attention.core_attention.softmax_offset", "{layer}.self_attn.sinks", "heads"),
    copy("{layer}.self_attention.linear_proj.bias", "{layer}.self_attn.o_proj.bias", "hidden"),
)
ROUTER = (
    *router("{layer}.mlp.router"),
    copy("{layer}.mlp.router.bias", "{layer}.mlp.router.bias", "experts", when=MOE),
)
EXPERTS = (
    *gated_mlp("{layer}.mlp.experts.experts", _EXPERT, "moe_ffn", MOE),
    WeightRule(
        "{layer}.mlp.experts.experts.linear_fc1.bias",
        (Source(f"{_EXPERT}.gate_proj.bias", ("moe_ffn",)), Source(f"{_EXPERT}.up_proj.bias", ("moe_ffn",))),
        CONCAT,
        MOE,
    ),
    copy("{layer}.mlp.experts.experts.linear_fc2.bias", f"{_EXPERT}.down_proj.bias", "hidden", when=MOE),
)
FAMILY = Family(
    "gpt_oss",
    architectures=("GptOssForCausalLM",),
    config=windowed(GPT_CONFIG, all_but_every(2), default=128),
    patches=(
        Refuse(
            lambda c: not c.get("attention_bias", True), "attention_bias false: experts and o_proj have biases here"
        ),
        Refuse(lambda c: c.get("swiglu_alpha", 1.702) != 1.702, "swiglu_alpha {swiglu_alpha} must be 1.702"),
        rotary_base(150000),
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
        ConfigRule("kv_channels", ("head_dim",), default=64, small=32),
        constant("add_qkv_bias", True),
        constant("disable_bias_linear", False),
        constant("softmax_type", "learnable"),
        constant("activation", "quick_gelu"),
        constant("glu_linear_offset", 1.0),
        ConfigRule("activation_func_clamp_value", ("swiglu_limit",), default=7.0),
        EXPERTS_HAVE_THE_WIDTH,
        constant("moe_router_pre_softmax", False),
    ),
    blocks=("expert_biases",),
    weights=decoder(
        ATTENTION, SINKS, ROUTER, EXPERTS, fused=fused_experts(transposed=True, interleaved=True, bias=True)
    ),
)
