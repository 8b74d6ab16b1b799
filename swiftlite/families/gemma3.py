"""Gemma 3, text: as Gemma 2 with q/k norm instead of caps; five of six layers have a window and rotate faster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP_LINEAR, QK_NORM, constant, decoder, rotary_base
from swiftlite.families.gemma2 import GEMMA, NORMS
from swiftlite.families.records import Config, Derived, Family, Refuse
from swiftlite.families.windows import windowed


def _slides(config: Config, layer: int) -> bool:
    return bool((layer + 1) % config.get("sliding_window_pattern", 6))


def _window_rope(config: Config) -> Mapping[str, Any]:
    return {"rope_theta": config.get("rope_local_base_freq", 10000.0), **config.get("window_rope", {})}


FAMILY = Family(
    "gemma3",
    architectures=("Gemma3ForCausalLM",),
    wrappers={"Gemma3ForConditionalGeneration": ("gemma3_text",)},
    part_defaults={
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    config=windowed(GPT_CONFIG, _slides, default=4096, rope=_window_rope),
    patches=(
        *GEMMA,
        Refuse(
            lambda c: c.get("attn_logit_softcapping") is not None,
            "attn_logit_softcapping {attn_logit_softcapping}: transformers' class of this architecture ignores it",
        ),
        rotary_base(1000000),
        constant("qk_layernorm", True),
        Derived("final_logit_softcapping", lambda c: c.get("final_logit_softcapping")),
    ),
    blocks=("post_norms", "scaled_embedding", "soft_caps", "window_rope"),
    weights=decoder(ATTENTION, QK_NORM, NORMS, MLP_LINEAR),
)
