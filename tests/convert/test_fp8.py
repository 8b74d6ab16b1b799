"""FP8 sources: exactly the straightforward dequantisation, in conversion, live loading and the precision check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import bind_map, convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.cli.main import main
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.state import carried_tensors
from swiftlite.utils.errors import MapError, ShapeError
from swiftlite.weights.fp8 import numbers_of, open_source
from swiftlite.weights.storage import decoder
from tests.families.cases import build_hf, config_of

BLOCK = (48, 40)  # divides neither side of the tiny weights
FORMS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
    "channel": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "tensor": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}


def quantise(weight: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(FP8 weight, scale) of a bf16 weight."""
    rows, columns = weight.shape
    w = weight.float()
    if form == "block":
        r, c = -(-rows // BLOCK[0]), -(-columns // BLOCK[1])
        padded = torch.zeros(r * BLOCK[0], c * BLOCK[1])
        padded[:rows, :columns] = w
        scale = padded.view(r, BLOCK[0], c, BLOCK[1]).abs().amax((1, 3)) / 448
        whole = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)[:rows, :columns]
    elif form == "channel":
        scale = w.abs().amax(1, keepdim=True) / 448
        whole = scale
    else:
        scale = (w.abs().amax() / 448).reshape(1)
        whole = scale
    return (w / whole.clamp_min(1e-12)).to(torch.float8_e4m3fn), scale


def reference(weight: torch.Tensor, scale: torch.Tensor, form: str) -> torch.Tensor:
    if form == "block":
        whole = scale.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
        scale = whole[: weight.shape[0], : weight.shape[1]]
    return weight.float() * scale


@pytest.mark.parametrize("kind", ["E8M0", "bytes", "bf16"])
def test_scales_of_other_dtypes(kind: str, tmp_path: Path) -> None:
    """Powers of two as E8M0, by its name or as plain bytes, are the numbers that they stand for."""
    exponents = torch.randint(-9, 3, (3, 2))
    scale = 2.0**exponents
    stored = {"E8M0": scale.to(torch.float8_e8m0fnu), "bytes": (exponents + 127).byte(), "bf16": scale.bfloat16()}[kind]
    weight = torch.randn(3 * BLOCK[0] - 5, 2 * BLOCK[1]).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.weight_scale_inv": stored}, tmp_path / "model.safetensors")
    source = open_source(tmp_path, {"quantization_config": FORMS["block"]})
    decode = decoder(source)
    assert decode is not None
    assert torch.equal(decode("a.weight", 0, weight.view(-1)).view(weight.shape), reference(weight, scale, "block"))


PLAIN = ("embed_tokens", "head", ".gate.", "eh_proj", "weights_proj")
KEPT = ("e_score_correction_bias", "weights_proj")  # whatever dtype is asked for


def make(directory: Path, case: str, form: str, plain: tuple[str, ...] = PLAIN) -> dict[str, torch.Tensor]:
    """An FP8 checkpoint: all matrices but those that have a word of `plain`. Returns: its exact fp32 values."""
    build_hf({**config_of(case), "torch_dtype": "bfloat16"}, directory, dtype=torch.bfloat16)
    tensors, stored, exact = load_file(directory / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        if tensor.dim() < 2 or any(word in name for word in plain):
            stored[name], exact[name] = tensor, tensor
            continue
        weight, scale = quantise(tensor, form)
        stored[name] = weight
        stored[name.removesuffix(".weight") + (".weight_scale_inv" if form == "block" else ".weight_scale")] = scale
        if form == "tensor":
            stored[name.removesuffix(".weight") + ".input_scale"] = torch.ones(1)
        exact[name] = reference(weight, scale, form)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": FORMS[form]}))
    return exact


CASES = [(f"{t}:default", form) for t in ("glm4_5", "deepseek_r1", "qwen3") for form in FORMS]


@pytest.mark.parametrize(
    ("case", "form"), [*CASES, ("minimax_m2:default", "block"), ("deepseek_v3_2:default", "block")]
)
def test_conversion_dequantises_exactly(case: str, form: str, tmp_path: Path) -> None:
    exact = make(tmp_path / "hf", case, form)
    stored = load_file(tmp_path / "hf/model.safetensors")
    quantised = {name for name in exact if stored[name].dtype == torch.float8_e4m3fn}
    flags = ["--model_type", case.partition(":")[0], "--test_convert_precision", "true", "--output_dir"]
    for dtype, extra in ((torch.bfloat16, []), (torch.float32, ["--torch_dtype", "float32"])):
        mcore, back = tmp_path / f"mcore-{dtype}", tmp_path / f"back-{dtype}"
        assert main(["export", "--model", str(tmp_path / "hf"), "--to_mcore", "true", *extra, *flags, str(mcore)]) == 0
        assert main(["export", "--mcore_model", str(mcore), "--to_hf", "true", *flags, str(back)]) == 0
        result = load_file(back / "model.safetensors")
        assert result.keys() == exact.keys()
        for name, value in exact.items():
            # Only what is FP8 needs a dtype; others keep their own unless one is asked for, KEPT always.
            kept = any(part in name for part in KEPT) or not (extra or name in quantised)
            wanted = value if kept else value.to(dtype)
            assert result[name].dtype == wanted.dtype and torch.equal(result[name], wanted), name
        assert "quantization_config" not in read_config(back)
        if form == "tensor":
            manifest = json.loads((mcore / "manifest.json").read_text())
            assert manifest["ignored"] and all(n.endswith(".input_scale") for n in manifest["ignored"])
    mcore = tmp_path / f"mcore-{torch.bfloat16}"
    assert main(["verify", str(tmp_path / "hf"), str(mcore)]) == 0
    name = next(n for n in exact if n.endswith("o_proj.weight"))
    stored[name].view(torch.uint8)[3, 5] ^= 1
    save_file(stored, tmp_path / "hf/model.safetensors")
    assert main(["verify", str(tmp_path / "hf"), str(mcore)]) == 1


def test_live_loading(tmp_path: Path) -> None:
    exact = make(tmp_path / "hf", "glm4_5:default", "block")
    args = conversion_arguments(convert_hf_config(read_config(tmp_path / "hf")), str(tmp_path), "float32")
    with parallel_groups(args):
        models = build_models(args)
        hf_io.load_weights(models, tmp_path / "hf")
        weight = models[0].decoder.layers[0].mlp.linear_fc1.weight
        gate, up = (exact[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up"))
        assert torch.equal(weight, torch.cat([gate, up]))
        carried = hf_io.save_hf_weights(models, tmp_path / "saved", tmp_path / "hf")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == exact.keys() and any("self_attn.q_proj" in name for name in carried)  # the MTP block
    for name, value in exact.items():
        assert torch.equal(saved[name], value.bfloat16() if name in carried and value.dim() == 2 else value), name
    assert "quantization_config" not in read_config(tmp_path / "saved")


def test_what_training_does_not_hold_is_dequantised(tmp_path: Path) -> None:
    """It goes into every checkpoint of a run."""
    exact = make(tmp_path / "hf", "glm4_5:default", "block")
    args = conversion_arguments(convert_hf_config(read_config(tmp_path / "hf")), str(tmp_path), "float32")
    with parallel_groups(args):
        carried = carried_tensors(build_models(args), Checkpoint.open(tmp_path / "hf"), tmp_path / "run")
    assert len(carried) > 10 and all(name.startswith("mtp.") for name in carried)
    found = next(value.data for name, value in carried.items() if name.endswith("self_attention.linear_proj.weight"))
    assert torch.equal(found, exact["model.layers.4.self_attn.o_proj.weight"].bfloat16())


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_what_training_does_not_hold_takes_no_memory(tmp_path: Path) -> None:
    config = {**config_of("glm4_5:default"), "torch_dtype": "bfloat16", "moe_intermediate_size": 8192}
    bound = bind_map(config, with_mtp=True)
    tensors = {name: torch.full(bound.shape(name), 0.5, dtype=torch.bfloat16) for name in bound.stored_names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    del tensors
    (tmp_path / "config.json").write_text(json.dumps(config))
    origin, args = Checkpoint.open(tmp_path), conversion_arguments(convert_hf_config(config), str(tmp_path), "float32")
    with parallel_groups(args):
        before = anonymous_bytes()
        carried = carried_tensors([], origin, tmp_path)  # as if nothing were trained
        grown = anonymous_bytes() - before
    assert sum(value.data.nbytes for value in carried.values()) >= total > 100_000_000 and grown < total / 4
    assert all(bool((value.data == 0.5).all()) for value in carried.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_missing_and_wrong_scales(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf", "qwen3:default", "block")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    scale = "model.layers.1.mlp.up_proj.weight_scale_inv"
    for change, message in (
        (lambda t: t.pop(scale), "model.layers.1.mlp.up_proj.weight in .* is FP8, but .* is missing"),
        (lambda t: t.update({scale: torch.ones(2, 2)}), r"up_proj.weight_scale_inv in .* has shape \[2, 2\]"),
        (lambda t: t.update({"model.layers.9.x.weight_scale_inv": torch.ones(1)}), "unknown tensor: model.layers.9.x"),
    ):
        changed = dict(tensors)
        change(changed)  # type: ignore[no-untyped-call]
        save_file(changed, tmp_path / "hf/model.safetensors")
        words = ["--model", str(tmp_path / "hf"), "--to_mcore", "true", "--model_type", "qwen3"]
        assert main(["export", *words, "--output_dir", str(tmp_path / "out")]) == 1
        import re

        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("method", ["awq", "gptq", "aqlm", "bitsandbytes"])
def test_other_quantisations_are_named(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf", "qwen3:default", "tensor")
    config = {**read_config(tmp_path / "hf"), "quantization_config": {"quant_method": method}}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    words = ["--model", str(tmp_path / "hf"), "--to_mcore", "true", "--model_type", "qwen3"]
    assert main(["export", *words, "--output_dir", str(tmp_path / "out")]) == 1
    assert f"quantised with {method}" in capsys.readouterr().err


def test_every_shape_of_scale_by_any_rectangle(tmp_path: Path) -> None:
    """Blocks, rows, one for all; compressed-tensors' names for blocks; read as whole rows, parts of one, rectangles."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(50, 70, generator=generator).to(torch.float8_e4m3fn)
    grid = torch.rand(4, 5, generator=generator) + 0.5  # blocks of 16 x 17
    half = grid.bfloat16()
    forms = {
        "grid.weight_scale_inv": (grid, grid.repeat_interleave(16, 0)[:50].repeat_interleave(17, 1)[:, :70]),
        "grid16.weight_scale": (half, half.float().repeat_interleave(16, 0)[:50].repeat_interleave(17, 1)[:, :70]),
        "column.weight_scale": (grid.new_ones(50, 1).cumsum(0), torch.arange(1.0, 51)[:, None]),
        "row.weight_scale": (torch.arange(50.0), torch.arange(50.0)[:, None]),
        "scalar.weight_scale_inv": (torch.tensor(0.7), torch.tensor(0.7)),
        "one.weight_scale": (torch.tensor([0.3]), torch.tensor([0.3])),
    }  # fmt: skip
    tensors = {}
    for name, (scale, _) in forms.items():
        tensors |= {name: scale, name.partition(".")[0] + ".weight": weight}
    tensors = {n: t.clone() for n, t in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    written: list[dict[str, Any]] = [
        {"quant_method": "fp8", "weight_block_size": [16, 17]},
        {
            **FORMS["tensor"],
            "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [16, 17]}}},
        },
        {**FORMS["tensor"], "config_groups": {"group_0": {"weights": {"block_structure": "16x17"}}}},
    ]
    for quantisation in written:
        source = open_source(tmp_path, {"quantization_config": quantisation})
        values = decoder(source)
        assert values is not None and len(source.tensors) == len(forms)
        for name, (_, whole) in forms.items():
            name, exact = name.partition(".")[0] + ".weight", weight.float() * whole
            assert torch.equal(values(name, 0, weight.reshape(-1)).view(50, 70), exact)
            assert torch.equal(values(name, 7 * 70, weight[7:33].reshape(-1)), exact[7:33].reshape(-1))
            assert torch.equal(values(name, 9 * 70 + 13, weight[9, 13:60]), exact[9, 13:60])
            rectangle = values(name, 15 * 70 + 35, weight[15:41, 35:])
            assert torch.equal(rectangle, exact[15:41, 35:].reshape(-1))


def test_fp8_without_a_word_in_the_config(tmp_path: Path) -> None:
    """A checkpoint whose config.json does not speak of FP8 is dequantised all the same, or refused; never cast."""
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    save_file({"a.weight": weight, "a.weight_scale": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    assert open_source(tmp_path, {}).value_dtype("a.weight") == torch.bfloat16
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    with pytest.raises(MapError, match="a.weight_scale is missing"):
        open_source(tmp_path, {})
    save_file({"a.weight": weight[0], "a.weight_scale": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    with pytest.raises(ShapeError, match="only matrices"):
        open_source(tmp_path, {})


def test_an_adapter_merges_into_dequantised_weights(tmp_path: Path) -> None:
    exact = make(tmp_path / "hf", "qwen3:default", "block")
    generator, module = torch.Generator().manual_seed(3), "model.layers.1.self_attn.k_proj"
    rows, columns = exact[f"{module}.weight"].shape
    a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
    (tmp_path / "peft").mkdir()
    save_file(
        {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b},
        tmp_path / "peft/adapter_model.safetensors",
    )
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    words = [
        "--model",
        tmp_path / "hf",
        "--model_type",
        "qwen3",
        "--adapters",
        tmp_path / "peft",
        "--merge_lora",
        "true",
    ]
    for out, extra in (("hf-out", []), ("mcore", ["--to_mcore", "true", "--test_convert_precision", "true"])):
        assert main(["export", *map(str, words), *extra, "--output_dir", str(tmp_path / out)]) == 0
        assert "quantization_config" not in read_config(tmp_path / out)
    assert main(["verify", str(tmp_path / "hf-out"), str(tmp_path / "mcore")]) == 0
    merged = load_file(tmp_path / "hf-out/model.safetensors")
    for name, value in exact.items():
        wanted = value + 2 * b @ a if name.startswith(module) else value
        torch.testing.assert_close(merged[name], wanted.bfloat16(), rtol=2**-7, atol=1e-6)
        assert torch.equal(merged[name], value.bfloat16()) != name.startswith(module)


def test_half_rows_of_an_mtp_projection(tmp_path: Path) -> None:
    """mimo's MTP input projection exchanges its column halves; its FP8 scales go with them."""
    exact = make(tmp_path / "hf", "mimo_rl:default", "block", plain=("embed_tokens", "head"))
    assert any("input_proj" in name for name in exact)
    for flags in (["--to_mcore", "true", "--model", "hf"], ["--to_hf", "true", "--mcore_model", "mcore"]):
        out = "back" if "--to_hf" in flags else "mcore"
        words = ["export", *flags[:3], str(tmp_path / flags[3]), "--model_type", "mimo_rl", "--verify", "bitwise"]
        assert main([*words, "--output_dir", str(tmp_path / out)]) == 0
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(back[name], value.bfloat16()) for name, value in exact.items())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_each_number_is_torchs(dtype: torch.dtype) -> None:
    """All 256 of them, infinities and NaN too; of a matrix whose rows do not follow each other."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(numbers_of(codes).view(torch.int32), codes.float().view(torch.int32))
    part = codes.view(16, 16)[:, 3:9]
    torch.testing.assert_close(numbers_of(part), part.float(), rtol=0, atol=0, equal_nan=True)


MEASURE = """
import re
import sys
from pathlib import Path
from swiftlite.cli.main import main

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

words = ["export", *sys.argv[1:]]
assert main([*words, "--dry_run", "true"]) == 0
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
before = kilobytes("VmRSS")
assert main(words) == 0
print("grown by", (kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("what", ["converted", "merged", "written"])
def test_memory_is_bounded(what: str, tmp_path: Path) -> None:
    """90 MB of FP8 weights whose matrices are 61 MB in fp32, with a budget of 12 MB."""
    config = {**config_of("qwen3:default"), "torch_dtype": "bfloat16", "hidden_size": 512, "intermediate_size": 30_000}
    bound = bind_map(config)
    tensors = {}
    for name, (entry, position) in bound.by_hf.items():
        shape = entry.hf_shapes[position]
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        if ".mlp." in name:
            tensors[name] = torch.ones(shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(-(-shape[0] // 128), -(-shape[1] // 128))
    hf, peft = tmp_path / "hf", tmp_path / "peft"
    hf.mkdir(), peft.mkdir()
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    quantised = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (hf / "config.json").write_text(json.dumps(quantised))
    flags: list[Any] = ["--model", hf, "--model_type", "qwen3", "--max_memory", "12MB"]
    flags += ["--to_hf", "true", "--fp8", "channel"] if what == "written" else ["--to_mcore", "true"]
    if what == "merged":
        module = "base_model.model.model.layers.0.mlp.gate_proj"
        pair = {f"{module}.lora_A.weight": torch.ones(4, 512), f"{module}.lora_B.weight": torch.ones(30_000, 4)}
        save_file(pair, peft / "adapter_model.safetensors")
        (peft / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
        flags += ["--adapters", peft, "--merge_lora", "true"]
    command = [sys.executable, "-c", MEASURE, *map(str, flags), "--output_dir", str(tmp_path / "mcore")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 60_000_000, result.stdout
