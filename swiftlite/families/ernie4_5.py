"""ERNIE 4.5, dense and MoE: interleaved rotary, softmax router whose correction bias only chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERT_BIAS,
    EXPERTS,
    GPT_CONFIG,
    MLP,
    SHARED_EXPERTS,
    constant,
    decoder,
    layer_list,
    rotary_base,
    router,
)
from swiftlite.families.records import Config, Derived, Family, Refuse
from swiftlite.weights.ops import FLATTEN
from swiftlite.weights.rule import Source, WeightRule

ROUTER = (
    *router("{layer}.mlp.gate", keep_dtype=True),
    WeightRule(
        "{layer}.mlp.router.expert_bias",
        (Source("{layer}.mlp.moe_statics.e_score_correction_bias", (1, "experts")),),
        FLATTEN,
        EXPERT_BIAS,
        keep_dtype=True,
        is_buffer=True,
    ),
)


def _text_width(config: Config) -> int | None:
    """Width of a text expert; multimodal releases list one per modality."""
    width = config.get("moe_intermediate_size")
    return width[0] if isinstance(width, list) else width


def _moe_layers(config: Config) -> str | None:
    """Experts from moe_layer_start_index to moe_layer_end_index where (layer + 1) % moe_layer_interval == 0."""
    if not config.get("moe_num_experts"):
        return None
    layers = config["num_hidden_layers"]
    start, end = config.get("moe_layer_start_index", 0), config.get("moe_layer_end_index")
    end = layers - 1 if end in (None, -1) else end
    every = config.get("moe_layer_interval", 1)
    return layer_list(start <= i <= end and (i + 1) % every == 0 for i in range(layers))


def _if_moe(value: Any) -> Callable[[Config], Any]:
    return lambda c: value if c.get("moe_num_experts") else None


PATCHES = (
    Refuse(lambda c: c.get("use_bias"), "use_bias true is not supported"),
    Derived("untie_embeddings_and_output_weights", lambda c: not c.get("tie_word_embeddings", True)),
    rotary_base(500000),
    constant("rotary_interleaved", True),
    Derived("moe_ffn_hidden_size", _text_width),
    Derived("moe_layer_freq", _moe_layers, {"moe_layer_start_index": 2, "moe_layer_end_index": 3}),
    Derived("moe_router_pre_softmax", _if_moe(False)),
    Derived("moe_router_enable_expert_bias", _if_moe(True)),
    Derived(
        "moe_shared_expert_intermediate_size",
        lambda c: (c.get("moe_num_shared_experts") or 0) * (_text_width(c) or 0) or None,
        {"moe_num_shared_experts": 2},
    ),
)

FAMILY = Family(
    "ernie4_5",
    architectures=("Ernie4_5_ForCausalLM", "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM"),
    config=GPT_CONFIG,
    patches=PATCHES,
    blocks=("softmax_bias_router",),
    weights=decoder(ATTENTION, MLP, ROUTER, EXPERTS, SHARED_EXPERTS),
)
