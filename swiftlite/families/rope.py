"""Rope settings of a config.json, in any spelling, as one: what contradicts itself or cannot be computed is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from swiftlite.utils.errors import ConfigError

# What may stand at the top of config.json or among the rope settings, by releases of transformers.
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_NUMBERS = (*_ROPE_KEYS, "factor", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor")
# Rope types of transformers -> settings without which they cannot be computed.
ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give rope settings the keys that hub configs use, whichever transformers version wrote the config.

    transformers 5 moves rope_theta, partial_rotary_factor and rope_scaling into `rope_parameters`; `type` is the old
    name of `rope_type`; 'default' means no scaling. Settings by kind of layer become those of layers that see the whole
    text and `window_rope`, those of layers with a window.
    Raises: ConfigError where two places contradict each other (releases of transformers read different ones), and for
        a rope type, or settings of one, that transformers cannot compute either.
    """
    flat, kinds = dict(config), _by_kind(config)
    if kinds is not None:
        flat["rope_parameters"] = kinds.get("full_attention")
        flat["window_rope"] = _rope_settings(kinds.get("sliding_attention"))
        _check_rope(flat["window_rope"], flat)
    settings = _agreed_settings(flat)
    flat.pop("rope_parameters", None)
    for key in _ROPE_KEYS:
        value = _one_value(key, {"at the top": flat.get(key), "among the rope settings": settings.get(key)})
        if key != "original_max_position_embeddings" and settings.pop(key, None) is not None:
            flat[key] = value
    _check_rope(settings, flat)
    flat["rope_scaling"] = None if settings.get("rope_type") in (None, "default") else settings
    return flat


def check_agreement(config: Mapping[str, Any]) -> None:
    """Raises: ConfigError where config.json has two values of a rope setting. Those by kind of layer are not compared."""
    if _by_kind(config) is not None:
        return
    settings = _agreed_settings(config)
    for key in _ROPE_KEYS:
        _one_value(key, {"at the top": config.get(key), "among the rope settings": settings.get(key)})


def _by_kind(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Kind of layer -> rope settings, where `rope_parameters` has them so."""
    parameters = config.get("rope_parameters")
    given = isinstance(parameters, Mapping) and any(isinstance(value, Mapping) for value in parameters.values())
    return parameters if given else None


def _agreed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` and `rope_scaling` of a config.json as one. Raises: ConfigError where they contradict."""
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if isinstance(scaling, int | float):
        scaling = {"type": "linear", "factor": float(scaling)}
    places = {"rope_parameters": _rope_settings(parameters), "rope_scaling": _rope_settings(scaling)}
    return {
        key: _one_value(key, {name: place.get(key) for name, place in places.items()})
        for key in dict.fromkeys(key for place in places.values() for key in place)
    }


def _rope_settings(value: Any) -> dict[str, Any]:
    """A dict of rope settings with `rope_type`. Raises: ConfigError for what is no dict of numbers."""
    if not value:
        return {}
    if not isinstance(value, Mapping) or any(isinstance(v, Mapping) for v in value.values()):
        raise ConfigError(f"config.json: rope settings {str(value)[:80]} must be a dict of numbers")
    settings = dict(value)
    if settings.get("rope_type") is None:
        settings["rope_type"] = settings.get("type") or "default"
    # Positions of images have three numbers, those of text three equal ones: plain rope.
    if settings["rope_type"] == "mrope":
        settings["rope_type"] = "default"
    if settings["rope_type"] == "su":  # what Phi-3 called it at first
        settings["rope_type"] = "longrope"
    return settings


def _one_value(key: str, places: Mapping[str, Any]) -> Any:
    """The value that all places agree on, None if none has one. Raises: ConfigError naming two that differ."""
    given = [(name, value) for name, value in places.items() if value is not None]
    for name, value in given:
        if value != given[0][1]:
            raise ConfigError(
                f"config.json has two values of {key}: {given[0][1]} ({given[0][0]}) and {value} ({name}); releases of "
                "transformers read different ones, so delete the wrong one"
            )
    return given[0][1] if given else None


def _check_rope(settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises: ConfigError for a rope type, or settings of one, that cannot be computed."""
    kind = settings.get("rope_type") or "default"
    if kind not in ROPE_TYPES:
        raise ConfigError(f"config.json: rope type {kind!r} is not known; supported: {', '.join(ROPE_TYPES)}")
    missing = [key for key in ROPE_TYPES[kind] if settings.get(key) is None]
    original = settings.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    takes_length = kind == "dynamic" or (kind in ("yarn", "longrope", "llama3") and original is None)
    if takes_length and config.get("max_position_embeddings") is None:
        missing.append("max_position_embeddings")
    if missing:
        raise ConfigError(f"config.json: rope type {kind!r} needs {', '.join(missing)}")
    for key in _ROPE_NUMBERS:
        value = settings.get(key, config.get(key))
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not _is_positive(number):
                raise ConfigError(f"config.json: {key} {number!r} must be a number above 0")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
