"""MiniMax-M2 to M2.7: q/k norm over all heads together, partial rotation, sigmoid router with correction bias."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    EXPERT_BIAS_ON,
    EXPERTS_HAVE_THE_WIDTH,
    FULL_QK_NORM,
    MIXTRAL_EXPERTS,
    PARTIAL_ROTARY_CONFIG,
    SIGMOID_ROUTER,
    constant,
    decoder,
    expert_bias,
    rotary_base,
)
from swiftlite.families.records import Config, ConfigRule, Derived, Family, Refuse


def _rotated(config: Config) -> float | None:
    """Releases give the rotated width, transformers writes a share of the head."""
    width = config.get("rotary_dim")
    return config.get("partial_rotary_factor") or (width / config.get("head_dim", 128) if width else None)


FAMILY = Family(
    "minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    config=PARTIAL_ROTARY_CONFIG,
    patches=(
        Refuse(lambda c: 0 in (c.get("attn_type_list") or ()), "attn_type_list has layers of linear attention"),
        Refuse(lambda c: c.get("use_qk_norm") is False, "use_qk_norm false: its layers have no q/k norm"),
        Refuse(
            lambda c: c.get("shared_intermediate_size"), "shared_intermediate_size {shared_intermediate_size} is not 0"
        ),
        rotary_base(5000000),
        ConfigRule("kv_channels", ("head_dim",), default=128),
        Derived("partial_rotary_factor", _rotated, {"rotary_dim": 16}),
        constant("qk_layernorm", True),
        *SIGMOID_ROUTER,
        EXPERT_BIAS_ON,
        EXPERTS_HAVE_THE_WIDTH,
    ),
    blocks=("full_qk_norm",),
    weights=decoder(
        ATTENTION, FULL_QK_NORM, MIXTRAL_EXPERTS, expert_bias("{layer}.block_sparse_moe.e_score_correction_bias")
    ),
)
