"""Which layers have a sliding window, and of what size, by config.json."""

from __future__ import annotations

from typing import Any

import pytest

from swiftlite.families.hf_config import convert_hf_config
from swiftlite.utils.errors import ConfigError

from .cases import config_of

ABSENT = object()


def converted(case: str, **change: Any) -> tuple[Any, Any]:
    config = {key: value for key, value in {**config_of(case), **change}.items() if value is not ABSENT}
    fields = convert_hf_config(config)
    return fields.get("window_size"), fields.get("window_attn_skip_freq")


@pytest.mark.parametrize(
    ("case", "change", "expected"),
    [
        ("mistral:default", {"sliding_window": 64}, (63, None)),
        ("mistral:default", {"sliding_window": None}, (None, None)),
        ("mistral:default", {"sliding_window": ABSENT}, (4095, None)),  # what transformers assumes
        ("mistral:window", {"layer_types": ["full_attention"] * 3}, (36, None)),  # which its class ignores
        ("mixtral:default", {"sliding_window": 64}, (63, None)),
        ("gemma2:default", {}, (32, "[1,0,1]")),
        ("gemma3_text:default", {}, (32, "[1,1,0,1]")),
        ("gemma3_text:default", {"sliding_window_pattern": ABSENT}, (32, None)),  # every sixth layer sees all
        ("olmo3:default", {}, (32, "[1,1,1,0,1]")),
        ("exaone4:default", {"layer_types": ABSENT}, (32, "[1,1,0]")),
        ("exaone4:full", {}, (None, None)),
        ("ministral:default", {}, (28, "[0,1,1]")),
        ("ministral:default", {"layer_types": ABSENT}, (28, None)),
        ("ministral:default", {"layer_types": ["full_attention"] * 3}, (None, None)),
        ("mixtral:default", {"sliding_window": ABSENT}, (None, None)),
        ("phi3:default", {}, (36, None)),
        ("phi3:default", {"sliding_window": ABSENT}, (None, None)),
    ],
)
def test_windows_of_a_config(case: str, change: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert converted(case, **change) == expected


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("mistral:default", {"sliding_window": 0}, "sliding_window 0 must be a whole number above 0"),
        ("mistral:default", {"sliding_window": "64"}, "sliding_window '64' must be"),
        (
            "ministral:default",
            {"layer_types": ["chunked_attention"] * 3},
            "may hold sliding_attention and full_attention",
        ),
        ("ministral:default", {"layer_types": ["full_attention"]}, "must have num_hidden_layers 3 entries"),
        ("llama:mha", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "uses sliding window attention"),
    ],
)
def test_what_is_no_window_is_refused(case: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(case, **change)
