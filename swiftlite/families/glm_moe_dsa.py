"""GLM-5 to 5.2: DeepSeek-V3.2, but that layers may share an indexer's choice."""

from __future__ import annotations

from swiftlite.families.blocks import GPT_CONFIG, layer_list
from swiftlite.families.deepseek_v32 import PATCHES, WEIGHTS
from swiftlite.families.records import Config, Derived, Family


def _indexed(config: Config) -> str:
    """Layers with an indexer: named one by one, or as letters, F for those, or every N-th from some layer on."""
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")
    if kinds:
        return layer_list(kind in ("full", "F") for kind in kinds)
    every, first = max(config.get("index_topk_freq") or 1, 1), config.get("index_skip_topk_offset", 2)
    return layer_list(max(i - first + 1, 0) % every == 0 for i in range(config["num_hidden_layers"]))


FAMILY = Family(
    "glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    config=GPT_CONFIG,
    patches=(*PATCHES, Derived("dsa_indexer_layers", _indexed)),
    blocks=("group_router",),
    weights=WEIGHTS,
)
