"""What is trained: names of frozen parameters, LoRA targets, adapters on experts, fp32 weights."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.model import tuner
from swiftlite.llm.model.names import checkpoint_tensors
from swiftlite.llm.model.tuner import trainable_names
from swiftlite.utils.errors import CheckpointError, ConfigError, UsageError
from swiftlite.weights.lora import ALL_LINEAR
from tests.families.cases import build_hf, config_of

SIZES = {"model.embed_tokens.weight": 40, "model.layers.0.w": 10, "model.layers.1.w": 10, "lm_head.weight": 40}


def args(**values: Any) -> Any:
    return SftArguments(model="DIR", **values)


@pytest.mark.parametrize(
    "values, trained",
    [
        ({}, set(SIZES)),
        ({"freeze_parameters": ["model.embed", "lm_head"]}, {"model.layers.0.w", "model.layers.1.w"}),
        ({"freeze_parameters_regex": r"layers\.0\."}, set(SIZES) - {"model.layers.0.w"}),
        ({"freeze_parameters_ratio": 0.55}, {"model.layers.1.w", "lm_head.weight"}),
        ({"freeze_parameters_ratio": 0.55, "trainable_parameters": ["model.embed"]},
         {"model.embed_tokens.weight", "model.layers.1.w", "lm_head.weight"}),
        ({"trainable_parameters_regex": r"layers\.1"}, {"model.layers.1.w"}),
    ],
)  # fmt: skip
def test_trainable_names(values: dict[str, Any], trained: set[str]) -> None:
    assert trainable_names(SIZES, args(train_type="freeze" if values else "full", **values)) == trained


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "say what with one of --freeze_parameters"),
        ({"freeze_parameters": ["layers"]}, "no parameter begins so; the first is model.embed_tokens.weight"),
        ({"freeze_parameters": ["model", "lm_head"]}, "nothing would be trained"),
        ({"freeze_parameters_regex": "gate_up"}, "--freeze_parameters_regex gate_up: fits no parameter"),
        ({"trainable_parameters_regex": "gate_up"}, "--trainable_parameters_regex gate_up: fits no parameter"),
        ({"freeze_parameters_regex": "w["}, r"--freeze_parameters_regex w\[: is not a regular expression"),
    ],
)
def test_what_cannot_be_trained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        trainable_names(SIZES, args(train_type="freeze", **values))


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_the_ratio_parts_nothing_that_a_side_joins(ratio: float) -> None:
    """Whatever the order in which a side lists its parameters."""
    layer = {"mlp.experts.{}.gate_proj": 8, "mlp.experts.{}.up_proj": 8, "mlp.experts.{}.down_proj": 8}
    sizes = {f"model.layers.{i}.{n.format(e)}.weight": s for i in range(3) for n, s in layer.items() for e in range(4)}
    sizes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": 5 for i in range(3) for n in "qkvo"}
    sizes |= {f"model.layers.{i}.input_layernorm.weight": 1 for i in range(12)}
    sizes |= {"lm_head.weight": 40, "model.norm.weight": 1, "model.embed_tokens.weight": 40}
    flags = args(train_type="freeze", freeze_parameters_ratio=ratio)
    trained = trainable_names(sizes, flags)
    assert trained == trainable_names(dict(sorted(sizes.items())), flags)
    share = 1 - sum(sizes[name] for name in trained) / sum(sizes.values())
    assert ratio - 0.2 < share <= ratio
    assert "lm_head.weight" in trained and "model.embed_tokens.weight" not in trained
    for i in range(3):
        for joined in ([f"self_attn.{n}_proj" for n in "qkv"],
                       [f"mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("gate", "up")]):  # fmt: skip
            assert len({f"model.layers.{i}.{name}.weight" in trained for name in joined}) == 1


def test_names_of_experts_are_the_checkpoints(tmp_path: Path) -> None:
    """Also of some experts only, and of one of the two matrices that transformers 5 joins."""
    for number, regex in enumerate((r"experts\.\d+\.", r"experts\.1\.(gate|up)_proj", r"experts\.\d+\.up_proj")):
        model = build_hf(config_of("glm4_5:default"), tmp_path / str(number))
        before = logits(model)
        tuner.freeze(model, args(train_type="freeze", trainable_parameters_regex=regex))
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
        stored = checkpoint_tensors(model)
        trained = {name for name, tensor in stored.items() if tensor.owner.requires_grad}
        assert trained == {name for name in stored if re.search(regex, name)} and trained


def test_targets() -> None:
    linear = {"q_proj", "gate_proj", "lm_head", "gate"}
    assert tuner.lora_targets(linear, args()) == {"q_proj", "gate_proj"}, "neither router nor output layer"
    assert tuner.lora_targets(linear, args(target_modules=["self_attn.q_proj"])) == {"self_attn.q_proj"}
    assert tuner.lora_targets(linear, args(target_regex=r".*\.q_proj")) == r".*\.q_proj"
    with pytest.raises(UsageError, match="--target_modules query: no such linear layer; there are gate, gate_proj"):
        tuner.lora_targets(linear, args(target_modules=["query"]))


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(3, 300, (2, 12)), use_cache=False).logits


@pytest.mark.parametrize("case", ["qwen2_moe:default", "glm4_5:default", "moonlight:default"])
def test_adapters_have_the_checkpoints_names(case: str, tmp_path: Path) -> None:
    """One pair per expert, shared experts and dense layers too; new ones change nothing; saved and loaded are equal."""
    config = config_of(case)
    model = build_hf(config, tmp_path / "hf")
    before = logits(model)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "hf/model.safetensors")
    layers = config["num_hidden_layers"]
    wanted = {n.removesuffix(".weight") for n in stored if n.rpartition(".")[0].rpartition(".")[2] in ALL_LINEAR
              and n.endswith(".weight") and f"layers.{layers}." not in n}  # fmt: skip
    adapted = tuner.lora_model(model, args(train_type="lora", lora_rank=2, lora_dropout=0))
    assert config["model_type"] == adapted.config.model_type
    torch.testing.assert_close(logits(adapted), before, rtol=1e-5, atol=1e-5)
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_B" in name:
            parameter.data.normal_(0, 0.2)
    changed = logits(adapted)
    assert (changed - before).abs().max() > 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {n.removeprefix("base_model.model.").split(".lora_")[0] for n in weights} == wanted
    again = tuner.attach_adapter(build_hf(config, tmp_path / "hf"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), changed, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    adapted = tuner.lora_model(build_hf(config_of("qwen3:default"), tmp_path / "a"), args(train_type="lora"))
    adapted.save_pretrained(tmp_path / "adapter")
    wider = {**config_of("qwen3:default"), "intermediate_size": 96}
    with pytest.raises(CheckpointError, match="does not fit the model"):
        tuner.attach_adapter(build_hf(wider, tmp_path / "b"), tmp_path / "adapter")
    deeper = {**config_of("qwen3:default"), "num_hidden_layers": 4, "max_window_layers": 4}
    with pytest.raises(CheckpointError, match="layers.3.*is missing in the one or the other"):
        tuner.attach_adapter(build_hf(deeper, tmp_path / "c"), tmp_path / "adapter")


STATED = {
    "rank beyond the file": ({"r": 10**6}, "r is 1000000; no matrix in .* has more than 8 rows"),
    "rank": ({"r": "8"}, "r is '8'"), "alpha": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "alpha of one": ({"alpha_pattern": {"q_proj": 1e308}}, "q_proj is 1e[+]308"),
    "rank of one": ({"rank_pattern": {"q_proj": 10**9}}, "q_proj is 1000000000; no matrix"),
    "patterns": ({"rank_pattern": [1]}, "adapter_config.json holds something unexpected"),
    "kind": ({"peft_type": "XX"}, "peft_type 'XX'"), "targets": ({"target_modules": 3}, "holds something unexpected"),
}  # fmt: skip


def test_a_hostile_adapter(tmp_path: Path) -> None:
    """As for merging: one line, before memory is asked for, and no model of NaN."""
    model = build_hf(config_of("qwen3:default"), tmp_path / "hf")
    tuner.lora_model(copy.deepcopy(model), args(train_type="lora")).save_pretrained(tmp_path / "adapter")
    file, weights = tmp_path / "adapter/adapter_config.json", tmp_path / "adapter/adapter_model.safetensors"
    stated = file.read_text()
    for changes, message in STATED.values():
        file.write_text(json.dumps({**json.loads(stated), **changes}))
        with pytest.raises((ConfigError, CheckpointError), match=message):
            tuner.attach_adapter(copy.deepcopy(model), tmp_path / "adapter")
    file.write_text(stated)
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] = float("inf")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="has values that are NaN or infinite"):
        tuner.attach_adapter(model, tmp_path / "adapter")


def test_trained_weights_are_held_in_fp32(tmp_path: Path) -> None:
    model = build_hf(config_of("qwen3:tied"), tmp_path / "a", dtype=torch.bfloat16)
    model = tuner.prepare_model(model, args(train_type="freeze", freeze_parameters=["model.layers.0."]))
    kinds = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == (torch.bfloat16, False)
    assert kinds["model.layers.1.mlp.up_proj.weight"] == (torch.float32, True)
    assert tuner.held_in_fp32(model) == {name for name, (_, trained) in kinds.items() if trained}
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied weights stay one"
    assert next(reversed(tuner.trainable_tensors(model))) != "lm_head.weight", "and have one name"
    tuner.freeze(model, args(train_type="freeze", freeze_parameters=["model.embed_tokens"]))
    assert not model.lm_head.weight.requires_grad


def test_rank_share_of_experts() -> None:
    """Adapters of experts count by the share of them that a token visits."""
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    model = SimpleNamespace(
        named_parameters=lambda: [("a.experts.0.up_proj.lora_A.weight", parameter), ("b.weight", parameter)],
        get_input_embeddings=lambda: SimpleNamespace(weight=None),
        get_output_embeddings=lambda: None,
    )
    flops = SimpleNamespace(expert_share=0.25)
    assert tuner.trained_weights(model, flops) == {"trained": None, "adapters": 3.0}
