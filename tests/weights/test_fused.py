"""Experts in one tensor: seen as single ones and back, in every orientation, in blocks of any size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite import families
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget, copy_job
from swiftlite.convert.mcore import McoreTarget
from swiftlite.families import family_of, tiny_configs
from swiftlite.families.blocks import fused_experts
from swiftlite.families.hf_config import convert_hf_config
from swiftlite.selftest.shrink import write_random_model
from swiftlite.utils.errors import MapError, ShapeError
from swiftlite.weights import joined as joined_module
from swiftlite.weights import stream
from swiftlite.weights.fused import FusedTensor
from swiftlite.weights.joined import Joined, Parts
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files, WeightSource, read_tensor

E, INNER, HIDDEN = 3, 5, 8
CASES = [(t, i, b) for t in (False, True) for i in (False, True) for b in (False, True)]


def single(bias: bool) -> dict[str, torch.Tensor]:
    shape = (INNER,) if bias else (INNER, HIDDEN)
    return {f"{e}.{part}": torch.randn(shape).bfloat16() for e in range(E) for part in ("gate", "up")}


def joined(tensors: dict[str, torch.Tensor], transposed: bool, interleaved: bool) -> torch.Tensor:
    """Written with torch's own words: [E, 2I, H], transposed, gate and up in turns."""
    of_expert = []
    for e in range(E):
        gate, up = tensors[f"{e}.gate"], tensors[f"{e}.up"]
        of_expert.append(torch.stack([gate, up], 1).flatten(0, 1) if interleaved else torch.cat([gate, up]))
    whole = torch.stack(of_expert)
    return whole.transpose(1, 2).contiguous() if transposed and whole.dim() == 3 else whole


@pytest.mark.parametrize(("transposed", "interleaved", "bias"), CASES)
@pytest.mark.parametrize("budget", [None, 100, 400])
def test_parts_and_the_way_back(
    transposed: bool, interleaved: bool, bias: bool, budget: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if budget:
        monkeypatch.setattr(joined_module, "READ_BYTES", 0)
    tensors = single(bias)
    whole = joined(tensors, transposed, interleaved)
    names = [[f"{e}.gate", f"{e}.up"] for e in range(E)]
    tensor = FusedTensor.of("w", names, {n: tuple(t.shape) for n, t in tensors.items()}, transposed, interleaved)
    assert tensor.shape == tuple(whole.shape)
    for folder, content in (("whole", {"w": whole}), ("single", tensors)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "model.safetensors")
    parts = Parts(SafetensorsSource(tmp_path / "whole"), [tensor])
    assert set(parts.names) == set(tensors)
    assert_copies(parts, tensors, tmp_path, budget)
    assert_copies(Joined(SafetensorsSource(tmp_path / "single"), [tensor]), {"w": whole}, tmp_path, budget)
    assert_copies(Joined(parts, [tensor]), {"w": whole}, tmp_path, budget)
    turned = whole if bias else whole.transpose(1, 2).contiguous()
    assert_copies(Joined(parts, [tensor.turned]), {"w": turned}, tmp_path, budget)
    with Files() as files:  # rectangles, as shards of a live model are
        for name, expected in tensors.items():
            data = bytearray(expected.nbytes)
            files.read_into(memoryview(data), parts.extents(name, 0, expected.nbytes))
            assert torch.equal(torch.frombuffer(data, dtype=torch.bfloat16).view(expected.shape), expected)
            if not bias:
                out = torch.empty(3, 4, dtype=torch.bfloat16)
                parts.read(name, 1 * HIDDEN + 2, out, files)
                assert torch.equal(out, expected[1:4, 2:6])


def assert_copies(source: WeightSource, expected: dict[str, torch.Tensor], folder: Path, budget: int | None) -> None:
    for name, tensor in expected.items():
        out = folder / "out"
        out.write_bytes(bytes(tensor.nbytes))
        hashes = stream.run([copy_job(source, name, out, 0, torch.bfloat16)], max_memory=budget)
        assert torch.equal(
            torch.frombuffer(bytearray(out.read_bytes()), dtype=torch.bfloat16).view(tensor.shape), tensor
        )
        with Files() as files:
            assert torch.equal(read_tensor(source, name, files), tensor)
            assert stream.hash_tensor(source, name, files) == hashes[name]


@pytest.fixture(params=[(False, False), (True, False), (True, True)], ids=["rows", "transposed", "interleaved"])
def both(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A Qwen3-MoE with single experts, and the same with all experts of a layer in two tensors."""
    transposed, interleaved = request.param
    config = tiny_configs()["qwen3_moe"]["default"]
    write_random_model(config, tmp_path / "single")
    family = family_of("Qwen3MoeForCausalLM")
    maps = replace(family.weights, fused=fused_experts(transposed=transposed, interleaved=interleaved))
    monkeypatch.setitem(families._FAMILIES, family.name, replace(family, weights=maps))
    tensors = load_file(tmp_path / "single/model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        experts = f"model.layers.{layer}.mlp.experts"
        own = [
            [tensors.pop(f"{experts}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")]
            for e in range(config["num_experts"])
        ]
        gate_up = [torch.stack(o[:2], 1).flatten(0, 1) if interleaved else torch.cat(o[:2]) for o in own]
        for name, value in (("gate_up_proj", gate_up), ("down_proj", [o[2] for o in own])):
            whole = torch.stack(value)
            tensors[f"{experts}.{name}"] = whole.transpose(1, 2).contiguous() if transposed else whole
    (tmp_path / "fused").mkdir()
    save_file(tensors, tmp_path / "fused/model.safetensors", {"format": "pt"})
    (tmp_path / "fused/config.json").write_text((tmp_path / "single/config.json").read_text())
    return tmp_path / "single", tmp_path / "fused"


def test_a_model_with_fused_experts(both: tuple[Path, Path], tmp_path: Path) -> None:
    """The same Megatron checkpoint as with single experts; the way back has the layout that there was."""
    quiet, mcore = Options(quiet=True, verify=True), {}
    for name, path in (("single", both[0]), ("fused", both[1])):
        mcore[name] = tmp_path / f"{name}-mcore"
        convert(Checkpoint.open(path), McoreTarget(num_files=1), mcore[name], quiet)
        convert(Checkpoint.open(mcore[name]), HfTarget(), tmp_path / f"{name}-back", quiet)
        back = tmp_path / f"{name}-back/model.safetensors"
        assert back.read_bytes() == (path / "model.safetensors").read_bytes()
    files = [(path / "iter_0000001/__0_0.distcp").read_bytes() for path in mcore.values()]
    assert sorted(files[0]) == sorted(files[1])
    (mcore["single"] / "manifest.json").unlink()
    convert(Checkpoint.open(mcore["single"]), HfTarget(), tmp_path / "unknown-back", quiet)
    expected, found = (load_file(p / "model.safetensors") for p in (both[1], tmp_path / "unknown-back"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected)


@pytest.mark.parametrize("form", ["block", "channel"])
def test_fp8_of_fused_experts_is_that_of_single_ones(both: tuple[Path, Path], form: str, tmp_path: Path) -> None:
    """Loaders of FP8 know single experts."""
    found = []
    (tmp_path / "out").mkdir()
    for path in both:
        convert(Checkpoint.open(path), HfTarget(fp8=form), tmp_path / "out" / path.name, Options(quiet=True))
        found.append(load_file(tmp_path / "out" / path.name / "model.safetensors"))
        config = (tmp_path / "out" / path.name / "config.json").read_text()
        assert "mlp.gate" in config and "mlp.experts" not in config
    assert found[0].keys() == found[1].keys() and any("experts.5.up_proj.weight_scale" in name for name in found[0])
    assert all(
        torch.equal(value.view(torch.uint8), found[1][name].view(torch.uint8)) for name, value in found[0].items()
    )


def test_live_models_load_and_save_fused_experts(both: tuple[Path, Path], tmp_path: Path) -> None:
    from swiftlite.arguments.megatron_export import conversion_arguments
    from swiftlite.megatron import hf_io
    from swiftlite.megatron.distributed import parallel_groups
    from swiftlite.megatron.model.provider import build_models

    origin = Checkpoint.open(both[1])
    args = conversion_arguments(convert_hf_config(origin.config), str(both[1]), "float32")
    with parallel_groups(args):
        models = build_models(args)
        hf_io.load_weights(models, origin)
        hf_io.save_hf_weights(models, tmp_path / "saved", origin)
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (both[1] / "model.safetensors").read_bytes()
    assert not (tmp_path / "saved/parts").exists()


def test_what_does_not_fit_is_named(both: tuple[Path, Path]) -> None:
    tensors = load_file(both[1] / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    for change, error, text in (
        ({name: tensors[name][:, :-1].contiguous()}, ShapeError, f"{name} in .* has shape"),
        ({f"{name[:-9]}0.down_proj.weight": torch.zeros(2, 2)}, MapError, "twice: in"),
    ):
        save_file({**tensors, **change}, both[1] / "model.safetensors", {"format": "pt"})
        with pytest.raises(error, match=text):
            Checkpoint.open(both[1])


def test_the_precision_check_reads_fused_experts(both: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers' model has them in an order of its own."""
    from swiftlite.selftest.precision import check_precision

    source = Checkpoint.open(both[1])
    convert(source, McoreTarget(), tmp_path / "mcore", Options(quiet=True))
    assert check_precision(source, tmp_path / "mcore").logits_max_diff < 1e-5
