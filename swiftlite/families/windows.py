"""Config rules of sliding windows: how many tokens one sees, and in which layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swiftlite.families.blocks import NO_WINDOW, ONE_ROPE, layer_list
from swiftlite.families.records import Config, Derived, Refuse, Rules

_KINDS = ("sliding_attention", "full_attention")


def everywhere(config: Config, layer: int) -> bool:
    """All layers have a window."""
    return True


def all_but_every(period: int) -> Callable[[Config, int], bool]:
    """Each layer but every `period`-th has one."""
    return lambda config, layer: (layer + 1) % period != 0


def window_layers(config: Config, slides: Callable[[Config, int], bool], by_types: bool = True) -> list[bool]:
    """Which layers have a window; see windowed."""
    types = config.get("layer_types") if by_types else None
    if types:
        return [kind == "sliding_attention" for kind in types]
    return [slides(config, layer) for layer in range(config["num_hidden_layers"])]


def windowed(
    rules: Rules,
    slides: Callable[[Config, int], bool],
    default: int | None = None,
    by_types: bool = True,
    rope: Callable[[Config], Mapping[str, Any] | None] | None = None,
) -> Rules:
    """`rules` of an architecture whose layers may have windows.

    slides: whether a layer has one where config.json has no layer_types, by which most classes in transformers go
        (by_types). default: tokens that they assume without sliding_window. rope: rope settings of these layers, where
        they have others than the rest (`window_rope` holds what config.json says by kind of layer).
    """

    def size(config: Config) -> int | None:
        window = config.get("sliding_window", default)
        return window - 1 if window is not None and any(window_layers(config, slides, by_types)) else None

    def layers(config: Config) -> str | None:
        found = window_layers(config, slides, by_types)
        return None if size(config) is None or all(found) else layer_list(found)

    return (
        *(rule for rule in rules if rule is not NO_WINDOW and (rule is not ONE_ROPE or rope is None)),
        Refuse(
            lambda c: c.get("sliding_window") is not None and not _is_positive(c["sliding_window"]),
            "sliding_window {sliding_window!r} must be a whole number above 0",
        ),
        Refuse(
            lambda c: by_types and any(kind not in _KINDS for kind in c.get("layer_types") or ()),
            "layer_types {layer_types} may hold " + " and ".join(_KINDS),
        ),
        Refuse(
            lambda c: by_types and len(c.get("layer_types") or ()) not in (0, c["num_hidden_layers"]),
            "layer_types {layer_types} must have num_hidden_layers {num_hidden_layers} entries",
        ),
        Derived("window_size", size, {"sliding_window": 64}),
        Derived("window_attn_skip_freq", layers),
        *((Derived("window_rope", rope),) if rope else ()),
    )


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
