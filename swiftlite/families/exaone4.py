"""EXAONE 4: norms behind attention and MLP, q/k norm; layers without a window do not rotate where others have one."""

from __future__ import annotations

from swiftlite.families.blocks import (
    ATTENTION_LINEAR,
    GPT_CONFIG,
    MLP_LINEAR,
    QK_NORM,
    constant,
    decoder,
    layer_list,
    post_norms,
)
from swiftlite.families.records import Config, ConfigRule, Derived, Family
from swiftlite.families.windows import window_layers, windowed

_WINDOW = 4096  # what transformers assumes


def _slides(config: Config, layer: int) -> bool:
    """Three of four layers, or of the kinds of a pattern such as LLLG."""
    pattern = config.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        return pattern[layer % len(pattern)] == "L" and layer != config["num_hidden_layers"] - 1
    return bool(pattern) and (layer + 1) % pattern != 0


def _without_rotation(config: Config) -> str | None:
    """1 for layers that see the whole text, of a model with windows."""
    if config.get("sliding_window", _WINDOW) is None:
        return None
    return layer_list(not slides for slides in window_layers(config, _slides))


FAMILY = Family(
    "exaone4",
    architectures=("Exaone4ForCausalLM",),
    config=windowed(GPT_CONFIG, _slides, default=_WINDOW),
    patches=(
        ConfigRule("norm_epsilon", ("rms_norm_eps",), default=1e-5),
        constant("qk_layernorm", True),
        Derived("no_rope_freq", _without_rotation),
    ),
    blocks=("post_norms", "no_input_norms"),
    weights=decoder(
        ATTENTION_LINEAR, QK_NORM, MLP_LINEAR, post_norms("post_attention_layernorm", "post_feedforward_layernorm")
    ),
)
