"""The precision check sees a damaged twin of each block of unusual layers, and names the layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from swiftlite import families
from swiftlite.families import family_of
from swiftlite.families.hf_config import architecture_of
from swiftlite.megatron.model.blocks import group_router, scaled_embedding
from swiftlite.selftest.precision import check_precision
from swiftlite.utils.errors import VerifyError
from swiftlite.weights.ops import COPY, FUSED_QKV
from swiftlite.weights.rule import WeightMap
from tests.families.cases import build_hf, config_of
from tests.families.test_round_trip import to_mcore
from tests.selftest.test_precision import Mutable


def setting(**changes: Any) -> Callable[[Mutable], None]:
    """Another config.json of the converted model."""

    def change(m: Mutable) -> None:
        path = m.root / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


KINDS = config_of("ministral:default")["layer_types"]
OTHER_FACTOR = {**config_of("ministral3:default")["rope_parameters"], "llama_4_scaling_beta": 0.09}
LONGROPE = config_of("phi3:longrope")["rope_scaling"]
SHORT = {**LONGROPE, "long_factor": LONGROPE["short_factor"]}
DAMAGES: dict[str, tuple[str, Callable[[Mutable], None], str]] = {
    "window too short by one": ("mistral:window", setting(sliding_window=36), "layer 0"),
    "window too long by one": ("mistral:window", setting(sliding_window=38), "layer 0"),
    "no window": ("mistral:window", setting(sliding_window=None), "layer 0"),
    "windows in other layers": ("ministral:default", setting(layer_types=KINDS[::-1]), "layer 0"),
    "scores without a cap": ("gemma2:default", setting(attn_logit_softcapping=None), "layer 0"),
    "logits without a cap": ("gemma2:default", setting(final_logit_softcapping=None), "output_layer"),
    "another scale of scores": ("gemma2:default", setting(query_pre_attn_scalar=24), "layer 0"),
    "gates by SiLU": ("gemma2:default", setting(hidden_activation="silu"), "layer 0"),
    "another base in windows": ("gemma3_text:default", setting(rope_local_base_freq=20000), "layer 0"),
    "another base without a window": ("gemma3_text:default", setting(rope_theta=500000), "layer 2"),
    "rotation not scaled": ("olmo3:default", setting(rope_scaling=None), "layer 3"),
    "a layer rotates": ("exaone4:default", setting(layer_types=["sliding_attention"] * 3), "layer 2"),
    "sinks left out": (
        "gpt_oss:default",
        lambda m: m.edit("model.layers.1.self_attn.sinks", lambda x: x - 1e4),
        "layer 1",
    ),
    "gates clamped elsewhere": ("gpt_oss:square", setting(swiglu_limit=7.0), "layer 0"),
    "a router bias zeroed": (
        "gpt_oss:default",
        lambda m: m.edit("model.layers.2.mlp.router.bias", lambda x: 0 * x),
        "layer 2",
    ),
    "rotated layers and others exchanged": ("smollm3:default", setting(no_rope_layers=[0, 1, 0]), "layer 0"),
    "a chunk too short by one": ("llama4_text:default", setting(attention_chunk_size=36), "layer 0"),
    "rotated queries without norms": ("llama4_text:default", setting(use_qk_norm=False), "layer 0"),
    "queries not scaled": ("llama4_text:default", setting(attn_temperature_tuning=False), "layer 2"),
    "short factors in a long text": ("phi3:longrope", setting(rope_scaling=SHORT), "layer 0"),
    "another number of groups": ("deepseek_r1:grouped_ratio1", setting(topk_group=1), "layer 1"),
    "another position factor": ("ministral3:default", setting(rope_parameters=OTHER_FACTOR), "layer 0"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_block_is_named(name: str, tmp_path: Path) -> None:
    case, damage, place = DAMAGES[name]
    build_hf(config_of(case), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    damage(Mutable(tmp_path / "mcore"))
    with pytest.raises(VerifyError, match=f"{place} is off: relative error"):
        check_precision(tmp_path / "hf", tmp_path / "mcore")


def joins(part: str, **changes: bool) -> Callable[[WeightMap], WeightMap]:
    """Another layout of the experts' tensors that have `part` in their name."""
    return lambda w: replace(w, fused=tuple(replace(f, **changes) if part in f.name else f for f in w.fused))


def qkv_as_it_is(weights: WeightMap) -> WeightMap:
    return replace(weights, layer=tuple(replace(r, op=COPY) if r.op == FUSED_QKV else r for r in weights.layer))


MAPS: dict[str, tuple[str, Callable[[WeightMap], WeightMap]]] = {
    "experts not transposed": ("gpt_oss:square", joins("down_proj", transposed=False)),
    "gate and up not in turns": ("gpt_oss:default", joins("gate_up_proj", interleaved=False)),
    "q, k and v not by groups": ("phi3:default", qkv_as_it_is),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_damaged_map_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, change = MAPS[name]
    build_hf(config_of(case), tmp_path / "hf")
    family = family_of(architecture_of(config_of(case)))
    with monkeypatch.context() as patch:
        patch.setitem(families._FAMILIES, family.name, replace(family, weights=change(family.weights)))
        to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(VerifyError, match="layer 0 is off: relative error"):
        check_precision(tmp_path / "hf", tmp_path / "mcore")


def test_an_embedding_without_its_factor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_hf(config_of("gemma3_text:default"), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    monkeypatch.setattr(scaled_embedding, "adapt", lambda *_: None)
    with pytest.raises(VerifyError, match="embedding is off: relative error"):
        check_precision(tmp_path / "hf", tmp_path / "mcore")


def test_groups_ranked_as_megatron_core_does_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_hf(config_of("deepseek_r1:grouped_ratio1"), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    monkeypatch.setattr(group_router, "replacements", lambda _: {})
    with pytest.raises(VerifyError, match="layer 1 is off: relative error"):
        check_precision(tmp_path / "hf", tmp_path / "mcore")
