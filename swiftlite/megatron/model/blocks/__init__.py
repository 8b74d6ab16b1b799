"""Unusual layers of single families, one module each, named by `McoreMeta.block`.

A block module may define `replacements(args) -> {megatron-core class: own class}`, applied to the layer spec, and
`adapt(model, args)`, called on the built model chunk.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from swiftlite.utils.errors import ConfigError


def load_block(name: str | None) -> ModuleType | None:
    """The block module of that name, None for None. Raises: ConfigError if there is no such module."""
    if name is None:
        return None
    full_name = f"{__name__}.{name}"
    if importlib.util.find_spec(full_name) is None:
        raise ConfigError(f"block {name!r} is named by a family but {full_name} does not exist")
    return importlib.import_module(full_name)
