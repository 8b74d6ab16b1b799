"""Objects recorded from ms-swift's conversion of GLM-4.5-Air, reproduced."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.checkpoint.bind import bind_map, convert_hf_config, flatten_config
from swiftlite.families import MODEL_MAPPING, families

GOLDEN = Path(__file__).parents[1] / "golden"
AIR = GOLDEN / "glm4_5_air"


def read(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


CONFIG = read("glm4_5_air/config.json")


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 saves it: rope keys in rope_parameters, dtype."""
    moved = {k: v for k, v in config.items() if k not in ("rope_theta", "partial_rotary_factor", "rope_scaling")}
    moved["dtype"] = moved.pop("torch_dtype")
    moved["rope_parameters"] = {"rope_theta": 1000000, "rope_type": "default", "partial_rotary_factor": 0.5}
    return moved


@pytest.mark.parametrize("config", [CONFIG, as_transformers_5(CONFIG)], ids=["hub", "transformers-5"])
def test_config_conversion_before_and_after_the_patches(config: dict[str, Any]) -> None:
    for patched, name in ((False, "before"), (True, "after")):
        mine = convert_hf_config(config, patched=patched)
        expected = read(f"glm4_5_air/megatron_config_{name}.json")
        assert mine == expected and list(mine) == list(expected)


def test_rope_scaling_of_either_spelling() -> None:
    yarn = {"factor": 4.0, "rope_type": "yarn", "original_max_position_embeddings": 64}
    old = flatten_config({"rope_theta": 5.0, "rope_scaling": {**yarn, "type": "yarn"}})
    new = flatten_config({"rope_parameters": {**yarn, "rope_theta": 5.0}})
    assert old["rope_scaling"] == {**yarn, "type": "yarn"} and new["rope_scaling"] == yarn
    assert old["rope_theta"] == new["rope_theta"] == 5.0


# What ms-swift's MegatronModelMeta of a GPT names, as swiftlite has it.
FUNCTIONS = {
    "model_provider": "swiftlite.megatron.model.provider",
    "convert_hf_config": "swiftlite.checkpoint.bind",
    "convert_mcore2hf": "swiftlite.cli.export",
    "convert_hf2mcore": "swiftlite.cli.export",
}


def test_registry_views() -> None:
    types = read("megatron_model_types.json")
    supported = {architecture for family in families() for architecture in family.architectures}
    mine = [t for t, meta in MODEL_MAPPING.items() if supported.intersection(meta.architectures)]
    assert mine[: len(types)] == types, "types that ms-swift does not have stand behind"
    assert dict.fromkeys(types, "gpt") == read("model_meta_mapping.json")
    expected = read("megatron_model_meta.json")
    assert expected == read("megatron_model_mapping.json")["gpt"] and expected.pop("model_types") == types
    found: dict[str, str | None] = {"megatron_model_type": "gpt", "extra_args_provider": None}
    for field, module in FUNCTIONS.items():
        found[field] = f"<function {getattr(importlib.import_module(module), field).__name__}>"
    found["convert_hf_config"] = found["convert_hf_config"].replace(
        "convert_hf", "convert_gpt_hf"
    )  # our name is shorter
    assert found == expected


def parse_tree(text: str) -> dict[str, str]:
    """A printed module tree as path -> class; `(1-45): 45 x` counts as layer 1."""
    found: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = re.match(r"( *)\((\d+-\d+|\w+)\): (?:\d+ x )?(\w+)", line)
        if match:
            depth, name, kind = len(match[1]), match[2].partition("-")[0], match[3]
            stack = [(d, n) for d, n in stack if d < depth]
            stack.append((depth, name))
            found[".".join(n for _, n in stack)] = kind
    return found


def test_hugging_face_module_tree() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(AIR))
    mine = parse_tree(str(model).replace("SiLUActivation", "SiLU"))
    expected = parse_tree((AIR / "hf_modules.txt").read_text())
    experts = "model.layers.1.mlp.experts"
    if mine[experts] != "ModuleList":  # transformers 5 keeps all experts of a layer in two tensors
        fused = model.model.layers[1].mlp.experts
        assert fused.gate_up_proj.shape == (128, 2 * 1408, 4096) and fused.down_proj.shape == (128, 4096, 1408)
        mine, expected = ({k: v for k, v in t.items() if not k.startswith(experts)} for t in (mine, expected))
    assert mine == expected


def test_weight_map_names_the_te_spec_module_tree() -> None:
    """Every mapped tensor belongs to a module of the recorded tree, and every module with weights is mapped."""
    tree = parse_tree((AIR / "mg_modules.txt").read_text())
    mapped = set()
    for entry in bind_map(CONFIG).entries:
        if entry.index is None or entry.index < 2:
            path, _, leaf = entry.mcore.replace(".experts.experts.", ".experts.").rpartition(".")
            assert path in tree, entry.mcore
            mapped.add((path, leaf))
    plain = {"TERowParallelLinear", "TEColumnParallelLinear", "ColumnParallelLinear", "TEColumnParallelGroupedLinear",
             "TERowParallelGroupedLinear", "VocabParallelEmbedding", "RMSNorm"}  # fmt: skip
    for path, kind in tree.items():
        if kind in plain or kind == "TopKRouter":
            assert (path, "weight") in mapped, path
        if kind == "TELayerNormColumnParallelLinear":
            assert {(path, "weight"), (path, "layer_norm_weight")} <= mapped, path
    assert ("decoder.layers.1.mlp.router", "expert_bias") in mapped
    assert ("decoder.layers.1.self_attention.linear_qkv", "bias") in mapped
    assert len(bind_map(CONFIG).by_hf) == sum(  # 1 dense and 45 MoE layers of 128 experts
        (3, 1 * (2 + 4 + 3 + 3), 45 * (2 + 4 + 3 + 2 + 3 * 128 + 3))
    )
