"""Hunyuan MoE (A13B): q/k norm after the rotation, a softmax router and one shared expert in every layer."""

from __future__ import annotations

from typing import Any

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERTS,
    EXPERTS_HAVE_THE_WIDTH,
    GPT_CONFIG,
    SHARED,
    constant,
    decoder,
    gated_mlp,
    router,
)
from swiftlite.families.hunyuan_v1_dense import PATCHES, QK_NORM
from swiftlite.families.records import Config, Derived, Family, Refuse

ROUTER = router("{layer}.mlp.gate.wg", keep_dtype=True)
SHARED_MLP = gated_mlp("{layer}.mlp.shared_experts", "{layer}.mlp.shared_mlp", "shared_ffn", SHARED)


def _of_layers(key: str, default: Any = None) -> Any:
    """The value of a key that may be a list of each layer's."""
    return lambda c: c[key][0] if isinstance(c.get(key), list) else c.get(key, default)


def _layers_differ(config: Config) -> bool:
    keys = ("num_experts", "moe_topk", "moe_intermediate_size", "num_shared_expert")
    return any(isinstance(config.get(key), list) and len(set(config[key])) > 1 for key in keys)


FAMILY = Family(
    "hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        *PATCHES,
        Refuse(
            _layers_differ, "num_experts, moe_topk, moe_intermediate_size or num_shared_expert differ between layers"
        ),
        Refuse(lambda c: _of_layers("num_shared_expert", 1)(c) != 1, "num_shared_expert {num_shared_expert} is not 1"),
        Refuse(lambda c: c.get("use_cla"), "use_cla true: its layers share keys and values"),
        Derived("num_experts", _of_layers("num_experts")),
        Derived("moe_router_topk", _of_layers("moe_topk", 1), {"moe_topk": 3}),
        EXPERTS_HAVE_THE_WIDTH,
        Derived("moe_shared_expert_intermediate_size", lambda c: c["intermediate_size"]),
        constant("moe_router_pre_softmax", False),
    ),
    blocks=("qk_norm_after_rope",),
    weights=decoder(ATTENTION, QK_NORM, ROUTER, EXPERTS, SHARED_MLP),
)
