"""Hunyuan dense (0.5B to 7B): q/k norm after the rotation."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, REFUSE_OUTPUT_BIAS, constant, copy, decoder
from swiftlite.families.records import Config, ConfigRule, Derived, Family, Rules

QK_NORM = tuple(
    copy(f"{{layer}}.self_attention.{mcore}.weight", f"{{layer}}.self_attn.{hf}.weight", "head_dim")
    for mcore, hf in (("q_layernorm", "query_layernorm"), ("k_layernorm", "key_layernorm"))
)


def _alpha(config: Config) -> float | None:
    """Rope type 'dynamic' with an alpha stretches the base once and for all, whatever the length."""
    scaling = config.get("rope_scaling") or {}
    return scaling.get("alpha") if scaling.get("rope_type") == "dynamic" else None


def _base(config: Config) -> float | None:
    width, alpha = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"], _alpha(config)
    return float(config.get("rope_theta", 10000.0)) * alpha ** (width / (width - 2)) if alpha else None


PATCHES: Rules = (
    REFUSE_OUTPUT_BIAS,
    constant("qk_layernorm", True),
    ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
    Derived("rotary_base", _base),
    Derived("rope_scaling", lambda c: {"rope_type": "default"} if _alpha(c) else None),
)

FAMILY = Family(
    "hunyuan_v1_dense",
    architectures=("HunYuanDenseV1ForCausalLM",),
    config=GPT_CONFIG,
    patches=PATCHES,
    blocks=("qk_norm_after_rope",),
    weights=decoder(ATTENTION, QK_NORM, MLP),
)
