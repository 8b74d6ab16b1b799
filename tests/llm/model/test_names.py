"""A model's tensors under their names in checkpoints: views of the live ones, strict loading, what is carried."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from swiftlite.llm.model.loader import get_model_tokenizer
from swiftlite.llm.model.names import Others, checkpoint_tensors, load_tensors
from swiftlite.llm.model.tuner import split_experts
from swiftlite.utils.errors import CheckpointError
from tests.families.cases import build_hf, config_of

TinyModel = Callable[..., Path]


@pytest.mark.parametrize("case", ["qwen3:tied", "glm4_5:default", "ernie:default", "moonlight:default"])
def test_names_are_the_checkpoints(case: str, tmp_path: Path) -> None:
    """Whatever transformers joins or renames; also after experts have been divided."""
    model = build_hf(config_of(case), tmp_path)
    stored, others = load_file(tmp_path / "model.safetensors"), Others.of(config_of(case))
    for _ in range(2):
        found = checkpoint_tensors(model)
        assert {n for n in stored if n not in found} == {n for n in stored if n.startswith(others.prefixes)}
        assert all(torch.equal(found[name].view, stored[name]) for name in stored if name in found)
        with torch.no_grad():
            for name in stored.keys() & found:
                found[name].view.zero_()
            assert not any(bool(t.any()) for t in model.state_dict().values()), "the views are the live tensors"
        load_tensors(model, tmp_path, others)
        assert all(torch.equal(found[name].view, stored[name]) for name in stored if name in found)
        split_experts(model)


def test_releases_that_drop_dimensions_of_size_one(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 squeezes each expert's part of a fused weight."""
    library = pytest.importorskip("transformers.core_model_loading", reason="transformers 4 joins no experts")
    plain = library.SplitModulelist.convert

    def squeezed(*args: Any, **options: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.squeeze() for name, tensor in plain(*args, **options).items()}

    monkeypatch.setattr(library.SplitModulelist, "convert", squeezed)
    stored = load_file(tiny_model("glm4_moe") / "model.safetensors")
    found = checkpoint_tensors(AutoModelForCausalLM.from_pretrained(tiny_model("glm4_moe")))
    assert all(torch.equal(found[name].view, stored[name]) for name in found)


def damaged(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


GONE, EXPERT = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(GONE), f"1 missing tensor: {GONE}"),
        (lambda t: t.update(other=torch.ones(2)), "1 unknown tensor: other"),
        (lambda t: t.update({GONE: torch.ones(2, 2)}), "o_proj.weight"),
    ],
)
def test_no_weights_are_missing_or_left_over(change: Any, message: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Neither when a model is loaded nor when a run resumes."""
    source = tiny_model("glm4_moe")
    model = AutoModelForCausalLM.from_pretrained(source)
    directory = damaged(source, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        get_model_tokenizer(str(directory))
    with pytest.raises(CheckpointError, match=message):
        load_tensors(model, directory, Others())


def test_one_experts_matrix_is_missing(tiny_model: TinyModel, tmp_path: Path) -> None:
    directory = damaged(tiny_model("glm4_moe"), tmp_path / "damaged", lambda t: t.pop(EXPERT))
    with pytest.raises(CheckpointError, match=r"experts"):
        get_model_tokenizer(str(directory))
    with pytest.raises(CheckpointError, match=f"1 missing tensor: {EXPERT}"):
        load_tensors(AutoModelForCausalLM.from_pretrained(tiny_model("glm4_moe")), directory, Others())


def test_what_is_declared_not_trainable_stays_so(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    build_hf(config_of("ernie:default"), tmp_path)
    for file in tiny_tokenizer_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, _ = get_model_tokenizer(str(tmp_path), need_template=False)
    assert model is not None
    kept = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert len(kept) == 3 and all(name.endswith("e_score_correction_bias") for name in kept)


def test_mtp_blocks_are_carried(tmp_path: Path) -> None:
    config = config_of("glm4_5:default")
    build_hf(config, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    block = f"model.layers.{config['num_hidden_layers']}."
    others = Others.of(json.loads((tmp_path / "config.json").read_text()))
    carried = others.carried(tmp_path, {"model.embed_tokens.weight"})
    assert carried.keys() == {name for name in stored if name.startswith(block)} and carried
    for name, of in carried.items():
        assert of == ("model.embed_tokens.weight" if name == f"{block}embed_tokens.weight" else name)
