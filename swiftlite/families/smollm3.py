"""SmolLM3: LLaMA of which every fourth layer does not rotate."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, REFUSE_OUTPUT_BIAS, decoder, layer_list, rotary_base
from swiftlite.families.records import Config, Derived, Family


def _without_rotation(config: Config) -> str:
    """1 for layers that do not rotate; config.json has 1 for those that do. Llama 4's too."""
    layers, every = range(config["num_hidden_layers"]), config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in layers]
    return layer_list(not rotated[layer] for layer in layers)


WITHOUT_ROTATION = Derived("no_rope_freq", _without_rotation)

FAMILY = Family(
    "smollm3",
    architectures=("SmolLM3ForCausalLM",),
    config=GPT_CONFIG,
    patches=(
        REFUSE_OUTPUT_BIAS,
        rotary_base(2000000),
        Derived("untie_embeddings_and_output_weights", lambda c: not c.get("tie_word_embeddings", True)),
        WITHOUT_ROTATION,
    ),
    weights=decoder(ATTENTION, MLP),
)
