"""Llama 4, text: some layers rotate and see the chunk of the text that they are in, the others scale queries by position;
an expert gets its token times the router's sigmoid score; all experts of a layer are in one tensor."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    DENSE,
    GPT_CONFIG,
    MLP_NORM,
    MOE,
    NO_WINDOW,
    REFUSE_OUTPUT_BIAS,
    SHARED,
    constant,
    decoder,
    fused_experts,
    gated_mlp,
    layer_list,
    rotary_base,
    router,
)
from swiftlite.families.records import Config, ConfigRule, Derived, Family, Refuse
from swiftlite.families.smollm3 import WITHOUT_ROTATION
from swiftlite.weights.rule import NAMINGS

_HF = "{layer}.feed_forward"

FEED_FORWARD = (
    *gated_mlp("{layer}.mlp", _HF, "ffn", DENSE),
    *router(f"{_HF}.router"),
    *gated_mlp("{layer}.mlp.experts.experts", f"{_HF}.experts.{{expert}}", "moe_ffn", MOE),
    *gated_mlp("{layer}.mlp.shared_experts", f"{_HF}.shared_expert", "shared_ffn", SHARED),
)


def _with_experts(config: Config) -> str:
    every, layers = config.get("interleave_moe_layer_step", 1), config.get("moe_layers")
    chosen = range(every - 1, config["num_hidden_layers"], every) if layers is None else layers
    return layer_list(layer in chosen for layer in range(config["num_hidden_layers"]))


def _temperature(config: Config) -> dict[str, float] | None:
    if not config.get("attn_temperature_tuning", True):
        return None
    return {"scale": config.get("attn_scale", 0.1), "floor": config.get("floor_scale", 8192)}


FAMILY = Family(
    "llama4",
    architectures=("Llama4ForCausalLM",),
    wrappers={"Llama4ForConditionalGeneration": ("llama4_text",)},
    config=tuple(rule for rule in GPT_CONFIG if rule is not NO_WINDOW),
    patches=(
        REFUSE_OUTPUT_BIAS,
        Refuse(
            lambda c: c.get("num_experts_per_tok", 1) != 1,
            "num_experts_per_tok {num_experts_per_tok}: Megatron scales the inputs of experts for one a token only",
        ),
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
        constant("qk_layernorm", False),
        rotary_base(500000),
        constant("rotary_interleaved", True),
        WITHOUT_ROTATION,
        ConfigRule("kv_channels", ("head_dim",), default=128, small=32),
        ConfigRule("ffn_hidden_size", ("intermediate_size_mlp",), default=16384, small=128),
        ConfigRule("moe_ffn_hidden_size", ("intermediate_size",), small=48),
        ConfigRule("moe_shared_expert_intermediate_size", ("intermediate_size",)),
        Derived("moe_layer_freq", _with_experts),
        constant("moe_router_topk", 1),
        constant("moe_router_score_function", "sigmoid"),
        constant("moe_apply_probs_on_input", True),
        Derived("attention_chunk_size", lambda c: c.get("attention_chunk_size", 8192), {"attention_chunk_size": 64}),
        Derived("attn_temperature", _temperature, {"floor_scale": 16}),
        Derived("qk_norm_of_rotated", lambda c: c.get("use_qk_norm", True)),
    ),
    blocks=("chunked_attention",),
    weights=decoder(
        ATTENTION,
        MLP_NORM,
        FEED_FORWARD,
        fused=fused_experts("{layer}.feed_forward.experts", transposed=True),
        live=NAMINGS[1],
    ),
)
