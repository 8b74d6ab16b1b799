"""How an architecture is expressed in megatron-core: config rules (HF key <-> argument), weight map, odd blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from swiftlite.weights.rule import WeightMap

Transform = Callable[[Any], Any]


@dataclass(frozen=True)
class ConfigRule:
    """`field` of MegatronArguments comes from the first of `hf` that is present and not None, through `to_mcore`.

    Where no key is present the field stays absent (its default applies) unless `default` is given.
    """

    field: str
    hf: tuple[str, ...]
    to_mcore: Transform | None = None
    default: Any = None


@dataclass(frozen=True)
class Derived:
    """`field` is computed from the whole HF config; a result of None leaves it absent."""

    field: str
    compute: Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Refuse:
    """A config that megatron-core cannot compute: `reason(config)` returns why, or None."""

    reason: Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class McoreMeta:
    """The Megatron side of a family.

    config: rules in the order in which the converted config lists its fields.
    patches: rules applied after `config` (what an architecture forces).
    weights: the declarative weight map.
    block: module under megatron/model/blocks/ that supplies unusual layers, or None.
    """

    config: tuple[ConfigRule | Derived | Refuse, ...]
    weights: WeightMap
    patches: tuple[ConfigRule | Derived | Refuse, ...] = ()
    block: str | None = None
