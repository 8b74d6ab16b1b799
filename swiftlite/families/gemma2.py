"""Gemma 2: norms before and behind attention and MLP, a window in every second layer, caps on scores and logits."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION,
    DENSE,
    GPT_CONFIG,
    MLP_LINEAR,
    REFUSE_OUTPUT_BIAS,
    activation,
    constant,
    copy,
    decoder,
    post_norms,
)
from swiftlite.families.records import ConfigRule, Derived, Family, Refuse, Rules
from swiftlite.families.windows import all_but_every, windowed

# What all of Gemma's text models have, 1 to 3.
GEMMA: Rules = (
    activation("hidden_activation"),
    REFUSE_OUTPUT_BIAS,
    Refuse(lambda c: c.get("use_bidirectional_attention"), "use_bidirectional_attention true is no causal attention"),
    Derived("activation", lambda c: c.get("hidden_activation") or "gelu_pytorch_tanh"),
    ConfigRule("kv_channels", ("head_dim",), default=256),
    Derived("softmax_scale", lambda c: c.get("query_pre_attn_scalar", 256) ** -0.5),
    Derived("embedding_multiplier", lambda c: c["hidden_size"] ** 0.5),
    Derived("untie_embeddings_and_output_weights", lambda c: not c.get("tie_word_embeddings", True)),
    constant("layernorm_zero_centered_gamma", True),
)
NORMS = (
    copy("{layer}.mlp.linear_fc1.layer_norm_weight", "{layer}.pre_feedforward_layernorm.weight", "hidden", when=DENSE),
    *post_norms("post_attention_layernorm", "post_feedforward_layernorm"),
)

FAMILY = Family(
    "gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=windowed(GPT_CONFIG, all_but_every(2), default=4096),
    patches=(
        *GEMMA,
        Derived("attn_logit_softcapping", lambda c: c.get("attn_logit_softcapping", 50.0)),
        Derived("final_logit_softcapping", lambda c: c.get("final_logit_softcapping", 30.0)),
    ),
    blocks=("post_norms", "scaled_embedding", "soft_caps"),
    weights=decoder(ATTENTION, NORMS, MLP_LINEAR),
)
