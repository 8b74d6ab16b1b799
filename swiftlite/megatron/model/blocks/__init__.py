"""Unusual layers, one module each, named by `Family.blocks`.

A block module may define
- `replacements(args) -> {megatron-core class: own class}`, applied to the layer specs,
- `change_layer(layer, args, index)`, called on each layer's spec, after that; index: the layer's number in the model,
- `adapt(model, args)`, called on the built model chunk.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

from swiftlite.utils.errors import ConfigError


def load_blocks(names: Iterable[str]) -> list[ModuleType]:
    """The block modules of these names. Raises: ConfigError if there is no such module."""
    modules = []
    for name in names:
        full_name = f"{__name__}.{name}"
        if importlib.util.find_spec(full_name) is None:
            raise ConfigError(f"block {name!r} is named by a family but {full_name} does not exist")
        modules.append(importlib.import_module(full_name))
    return modules
