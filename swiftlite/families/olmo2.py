"""OLMo 2: norms behind attention and MLP instead of before them, q/k norm over all heads together."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION_LINEAR,
    FULL_QK_NORM,
    GPT_CONFIG,
    MLP_LINEAR,
    REFUSE_OUTPUT_BIAS,
    constant,
    decoder,
    post_norms,
)
from swiftlite.families.records import ConfigRule, Family

FAMILY = Family(
    "olmo2",
    architectures=("Olmo2ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        constant("qk_layernorm", True),
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
    ),
    blocks=("post_norms", "no_input_norms", "full_qk_norm"),
    weights=decoder(
        ATTENTION_LINEAR, FULL_QK_NORM, MLP_LINEAR, post_norms("post_attention_layernorm", "post_feedforward_layernorm")
    ),
)
