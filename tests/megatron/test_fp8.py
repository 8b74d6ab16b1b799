"""FP8 sources: exactly the straightforward dequantisation, in conversion, live loading and the precision check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.cli.main import main
from swiftlite.megatron import hf_io
from swiftlite.megatron.argument.export import conversion_arguments
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.hf_config import convert_hf_config
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.side_files import read_config
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


def make(directory: Path, case: str, form: str) -> dict[str, torch.Tensor]:
    """An FP8 checkpoint: all matrices but embedding, head and routers. Returns: its exact fp32 values."""
    build_hf({**config_of(case), "torch_dtype": "bfloat16"}, directory, dtype=torch.bfloat16)
    tensors, stored, exact = load_file(directory / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        plain = tensor.dim() < 2 or any(p in name for p in ("embed_tokens", "head", "mlp.gate.", "eh_proj"))
        if plain:
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


CASES = {"glm4_5:default": "glm4_5", "deepseek_r1:default": "deepseek_r1", "qwen3:default": "qwen3"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_conversion_dequantises_exactly(case: str, form: str, tmp_path: Path) -> None:
    exact = make(tmp_path / "hf", case, form)
    flags = ["--model_type", CASES[case], "--test_convert_precision", "true", "--output_dir"]
    for dtype, extra in ((torch.bfloat16, []), (torch.float32, ["--torch_dtype", "float32"])):
        mcore, back = tmp_path / f"mcore-{dtype}", tmp_path / f"back-{dtype}"
        assert main(["export", "--model", str(tmp_path / "hf"), "--to_mcore", "true", *extra, *flags, str(mcore)]) == 0
        assert main(["export", "--mcore_model", str(mcore), "--to_hf", "true", *flags, str(back)]) == 0
        result = load_file(back / "model.safetensors")
        assert result.keys() == exact.keys()
        for name, value in exact.items():
            wanted = value if "e_score_correction_bias" in name else value.to(dtype)
            assert torch.equal(result[name], wanted), name
        assert "quantization_config" not in read_config(back)


def test_live_loading(tmp_path: Path) -> None:
    exact = make(tmp_path / "hf", "glm4_5:default", "block")
    args = conversion_arguments(convert_hf_config(read_config(tmp_path / "hf")), str(tmp_path), "float32")
    with parallel_groups(args):
        models = build_models(args)
        hf_io.load_weights(models, tmp_path / "hf")
        weight = models[0].decoder.layers[0].mlp.linear_fc1.weight
        gate, up = (exact[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up"))
        assert torch.equal(weight, torch.cat([gate, up]))


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


@pytest.mark.parametrize("method", ["awq", "gptq", "aqlm", "bitsandbytes", "mxfp4"])
def test_other_quantisations_are_named(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "hf", "qwen3:default", "tensor")
    config = {**read_config(tmp_path / "hf"), "quantization_config": {"quant_method": method}}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    words = ["--model", str(tmp_path / "hf"), "--to_mcore", "true", "--model_type", "qwen3"]
    assert main(["export", *words, "--output_dir", str(tmp_path / "out")]) == 1
    assert f"quantised with {method}" in capsys.readouterr().err
