"""The precision check passes what is right, for every model type, and names the place of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.arguments.description import ModelDescription
from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.llm.model import reference
from swiftlite.selftest.precision import TOLERANCES, check_precision
from swiftlite.utils.errors import VerifyError
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.storage import Files, byte_view, read_tensor
from swiftlite.weights.torch_dist import HfNames, McoreView
from tests.families.cases import build_hf, config_of, distinct_cases
from tests.families.test_round_trip import to_mcore

reference.register()


@pytest.mark.parametrize("case", distinct_cases())
def test_every_model_type_computes_the_same_logits(case: str, tmp_path: Path) -> None:
    """fp32: the largest difference of logits is at most 1e-5 x max(1, largest logit)."""
    build_hf(config_of(case), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    report = check_precision(tmp_path / "hf", tmp_path / "mcore")
    assert report.num_tokens >= 300
    assert report.logits_max_diff <= 1e-5 * report.scale
    assert report.argmax_agreement > 0.99
    assert report.hf_parameters - report.mcore_parameters == _copies(tmp_path / "hf")


def _copies(directory: Path) -> int:
    """Elements that a checkpoint stores twice and Megatron once."""
    checkpoint = Checkpoint.open(directory)
    return sum(checkpoint.source.spec(name).numel for name in checkpoint.copies)


class Mutable:
    """A converted checkpoint whose tensors can be changed under their Hugging Face names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        bound = bind_map(read_config(root), with_mtp=True)
        self.names = HfNames(McoreView.open(TorchDistSource(root / "iter_0000001"), bound))

    def __getitem__(self, name: str) -> torch.Tensor:
        with Files() as files:
            return read_tensor(self.names, name, files)

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        view, done = byte_view(tensor.contiguous()), 0
        with Files() as files:
            for extent in self.names.extents(name, 0, len(view)):
                files.write(extent.file, extent.offset, view[done : done + extent.size])
                done += extent.size

    def swap(self, a: str, b: str) -> None:
        self[a], self[b] = self[b], self[a]

    def edit(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self[name] = change(self[name])


def _swap_layers(m: Mutable) -> None:
    for name in list(m.names.names):
        if name.startswith("model.layers.2."):
            m.swap(name, name.replace("layers.2.", "layers.3."))


def _swap_experts(m: Mutable) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        m.swap(f"model.layers.2.mlp.experts.3.{part}.weight", f"model.layers.2.mlp.experts.4.{part}.weight")


def _rope_base(m: Mutable) -> None:
    path = m.root / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] /= 2
    path.write_text(json.dumps(config))


def _heads(x: torch.Tensor) -> torch.Tensor:
    heads = x.view(4, 32, -1)
    return heads[[1, 0, 2, 3]].reshape(x.shape)


ATTENTION = "model.layers.3.self_attn"
MUTATIONS: dict[str, tuple[Callable[[Mutable], None], str]] = {
    "gate and up swapped": (
        lambda m: m.swap("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"), "layer 0"),
    "q heads permuted": (lambda m: m.edit("model.layers.1.self_attn.q_proj.weight", _heads), "layer 1"),
    "k and v swapped": (
        lambda m: m.swap(f"{ATTENTION}.k_proj.weight", f"{ATTENTION}.v_proj.weight"), "layer 3"),
    "a norm set to 1": (lambda m: m.edit("model.layers.2.input_layernorm.weight", torch.ones_like), "layer 2"),
    "final norm set to 1": (lambda m: m.edit("model.norm.weight", torch.ones_like), "final_layernorm"),
    "experts 3 and 4 swapped": (_swap_experts, "layer 2"),
    "a router row permuted": (lambda m: m.edit("model.layers.1.mlp.gate.weight", lambda x: x.roll(1, 0)), "layer 1"),
    "a bias zeroed": (lambda m: m.edit(f"{ATTENTION}.q_proj.bias", torch.zeros_like), "layer 3"),
    "expert bias zeroed": (
        lambda m: m.edit("model.layers.2.mlp.gate.e_score_correction_bias", torch.zeros_like), "layer 2"),
    "an lm_head row shifted": (lambda m: m.edit("lm_head.weight", lambda x: x.roll(1, 0)), "output_layer"),
    "an embedding row shifted": (lambda m: m.edit("model.embed_tokens.weight", lambda x: x.roll(1, 0)), "embedding"),
    "layers 2 and 3 swapped": (_swap_layers, "layer 2"),
    "rope base changed": (_rope_base, "layer 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    build_hf(config_of("glm4_5:default"), root / "hf")
    to_mcore(root / "hf", root / "mcore")
    return root


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_fails_and_its_place_is_named(mutation: str, converted: Path, tmp_path: Path) -> None:
    change, place = MUTATIONS[mutation]
    shutil.copytree(converted / "mcore", tmp_path / "mcore")
    change(Mutable(tmp_path / "mcore"))
    with pytest.raises(VerifyError, match=f"{place} is off: relative error"):
        check_precision(converted / "hf", tmp_path / "mcore")


def _per_head(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=norm.eps) * norm.weight.view(x.shape[-2:])


# What is left out or changed of a model's own blocks, under `swiftlite.megatron.model.blocks`.
TWINS: dict[str, tuple[str, str, Any, str]] = {
    "norms not zero-centred": ("gemma2", "layernorm_zero_centered_gamma", False, "layer 0"),
    "a norm behind attention left out": (
        "glm4_0414", "post_norms._normalise", lambda part, norm: None, "layer 0"),
    "q/k norm of each head": ("olmo2", "full_qk_norm.FullNorm.forward", _per_head, "layer 0"),
    "q/k norm before rotation": ("hunyuan_v1_dense", "qk_norm_after_rope.adapt", lambda model, args: None, "layer 0"),
    "residual multiplier 1": ("granite", "residual_multiplier", 1.0, "layer 0"),
    "embedding multiplier 1": ("granite", "embedding_multiplier", 1.0, "embedding"),
    "logits not scaled": ("granite", "logits_scaling", 1.0, "output_layer"),
    "scale of attention scores": ("granite", "softmax_scale", 0.25, "layer 0"),
}  # fmt: skip


@pytest.mark.parametrize("twin", TWINS)
def test_a_damaged_block_fails_and_its_place_is_named(
    twin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, name, value, place = TWINS[twin]
    build_hf(config_of(f"{model_type}:default"), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    if "." in name:
        monkeypatch.setattr(f"swiftlite.megatron.model.blocks.{name}", value)
    else:
        of = ModelDescription.of
        monkeypatch.setattr(ModelDescription, "of", lambda config: replace(of(config), **{name: value}))
    with pytest.raises(VerifyError, match=f"{place} is off: relative error"):
        check_precision(tmp_path / "hf", tmp_path / "mcore")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_stays_within_its_stated_tolerance(dtype: torch.dtype, converted: Path) -> None:
    class Args:
        test_convert_dtype = str(dtype).removeprefix("torch.")

    report = check_precision(converted / "hf", converted / "mcore", Args())
    assert report.fault() is None
    assert max(p.forced for p in report.parts) > TOLERANCES[torch.float32].part  # it really ran in that dtype
