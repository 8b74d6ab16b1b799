"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotation is not scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from swiftlite.families.blocks import GPT_CONFIG, rotary_base
from swiftlite.families.olmo2 import FAMILY as OLMO2
from swiftlite.families.records import Config
from swiftlite.families.windows import all_but_every, windowed

_BASE = 500000


def _window_rope(config: Config) -> Mapping[str, Any] | None:
    own, base = config.get("window_rope"), config.get("rope_theta", _BASE)
    return {"rope_theta": base, **(own or {})} if own is not None or config["rope_scaling"] else None


FAMILY = replace(
    OLMO2,
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    config=windowed(GPT_CONFIG, all_but_every(4), default=4096, rope=_window_rope),
    patches=(*OLMO2.patches, rotary_base(_BASE)),
    blocks=(*OLMO2.blocks, "window_rope"),
)
