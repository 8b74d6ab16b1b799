"""Ministral 3: Mistral whose queries grow with the position beyond the length of its pre-training."""

from __future__ import annotations

from swiftlite.families.blocks import ATTENTION, GPT_CONFIG, MLP, decoder
from swiftlite.families.records import Config, Family, Refuse
from swiftlite.families.windows import everywhere, windowed


def _lacks_factor(config: Config) -> bool:
    scaling = config["rope_scaling"] or {}
    return any(scaling.get(key) is None for key in ("llama_4_scaling_beta", "original_max_position_embeddings"))


FAMILY = Family(
    "ministral3",
    architectures=("Ministral3ForCausalLM",),
    wrappers={"Mistral3ForConditionalGeneration": ("ministral3",)},
    config=windowed(GPT_CONFIG, everywhere, by_types=False),
    patches=(
        Refuse(_lacks_factor, "its rope settings need llama_4_scaling_beta and original_max_position_embeddings"),
    ),
    blocks=("position_factor",),
    weights=decoder(ATTENTION, MLP),
)
