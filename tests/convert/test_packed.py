"""Weights of 4 bits: exactly what transformers and compressed-tensors make of them, in every use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.cli.main import main
from swiftlite.utils.errors import ConfigError
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.storage import Files, read_tensor
from tests.convert.test_fp8 import MEASURE
from tests.families.cases import build_hf, config_of

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp.(gate|up|down)_proj.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def made(directory: Path, case: str, quantisation: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """A packed checkpoint. Returns: its values, by the library that defines the format."""
    torch.manual_seed(7)
    config = {**config_of(case), **changes, "torch_dtype": "bfloat16"}
    build_hf(config, directory, dtype=torch.bfloat16)
    tensors = load_file(directory / "model.safetensors")
    pack = mxfp4 if quantisation["quant_method"] == "mxfp4" else int4
    stored: dict[str, torch.Tensor] = {}
    exact = {name: pack(name, tensor, stored, quantisation) for name, tensor in tensors.items()}
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**written, "quantization_config": quantisation}))
    return exact


def mxfp4(name: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor], _: object) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    if not name.endswith(("gate_up_proj", "down_proj")):
        stored[name] = tensor
        return tensor
    experts, columns, rows = tensor.shape
    stored[f"{name}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    stored[f"{name}_scales"] = torch.randint(119, 124, (experts, rows, columns // 32), dtype=torch.uint8)
    return convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])


def int4(name: str, tensor: torch.Tensor, stored: dict[str, torch.Tensor], quantisation: Any) -> torch.Tensor:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    if ".experts." not in name:
        stored[name] = tensor
        return tensor
    scheme = QuantizationScheme(**quantisation["config_groups"]["group_0"])
    assert scheme.weights is not None
    size = scheme.weights.group_size or tensor.shape[1]
    pad = torch.nn.functional.pad(tensor, (0, -tensor.shape[1] % size))
    scale = pad.unflatten(1, (-1, size)).abs().amax(2) / 7.5
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress({"weight": tensor, "weight_scale": scale}, scheme)
    stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in packed.items()}
    return compressor.decompress(packed, scheme)["weight"]


CASES = [
    ("gpt_oss:default", {"quant_method": "mxfp4"}, {"hidden_size": 96, "intermediate_size": 64}),
    ("gpt_oss:square", {"quant_method": "mxfp4"}, {}),  # the orientation does not follow from the shapes
    ("moonlight:default", INT4, {"hidden_size": 96, "moe_intermediate_size": 32}),
]


@pytest.mark.parametrize(("case", "quantisation", "changes"), CASES)
def test_conversion_unpacks_exactly(
    case: str, quantisation: dict[str, Any], changes: dict[str, int], tmp_path: Path
) -> None:
    exact = made(tmp_path / "hf", case, quantisation, **changes)
    flags = ["--model_type", case.partition(":")[0], "--test_convert_precision", "true", "--verify", "bitwise"]
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    words = ["--model", str(tmp_path / "hf"), "--to_mcore", "true", "--output_dir", str(mcore)]
    assert main(["export", *words, *flags]) == 0
    words = ["--mcore_model", str(mcore), "--to_hf", "true", "--output_dir", str(back)]
    assert main(["export", *words, *flags]) == 0
    result = load_file(back / "model.safetensors")
    assert result.keys() == exact.keys() and "quantization_config" not in read_config(back)
    for name, value in exact.items():
        assert result[name].dtype == value.dtype and torch.equal(result[name], value), name
    assert main(["verify", str(tmp_path / "hf"), str(mcore)]) == 0


@pytest.mark.parametrize(("case", "quantisation", "changes"), [*CASES[1:2], ("deepseek_r1:default", INT4, CASES[2][2])])
def test_transformers_loads_numbers(
    case: str, quantisation: dict[str, Any], changes: dict[str, int], tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    """Steps and adapters need some; transformers unpacks them where it is asked to."""
    from swiftlite.llm.model.loader import get_model_tokenizer

    exact = made(tmp_path / "hf", case, quantisation, **changes)
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "hf")
    model = get_model_tokenizer(str(tmp_path / "hf"), model_type=case.partition(":")[0])[0]
    experts = 0
    for name, value in model.state_dict().items():
        assert value.dtype == torch.bfloat16 or "gate." in name, name  # routers compute in fp32
        if name in exact:
            assert torch.equal(value, exact[name].to(value.dtype)), name
        elif name.endswith("gate_up_proj"):
            parts = (name.replace("gate_up_proj", f"{len(value) - 1}.{part}_proj.weight") for part in ("gate", "up"))
            assert torch.equal(value[-1], torch.cat([exact[part] for part in parts]))
        experts += "experts.gate_up_proj" in name
    assert experts


@pytest.mark.parametrize("group", [32, 48, None])
def test_rectangles_of_int4(group: int | None, tmp_path: Path) -> None:
    """A width that fills neither the last word nor the last group, read as rows, parts of one and rectangles."""
    columns = 96 if group else 77
    weights = {**WEIGHTS, "group_size": group}
    weights["strategy"] = "group" if group else "channel"
    quantisation = {**INT4, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    stored: dict[str, torch.Tensor] = {}
    exact = int4("a.experts.b.weight", torch.randn(21, columns).bfloat16(), stored, quantisation)
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path, {"quantization_config": quantisation})
    check_reads(source, "a.experts.b.weight", exact)


def test_rectangles_of_mxfp4(tmp_path: Path) -> None:
    """All exponents but that of NaN, and rows of several experts at once."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored = {
        "e.w_blocks": torch.randint(256, (3, 10, 3, 16), dtype=torch.uint8),
        "e.w_scales": torch.arange(90).mul(17).remainder(254).byte().view(3, 10, 3),
    }
    save_file(stored, tmp_path / "model.safetensors")
    source = open_source(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    exact = convert_moe_packed_tensors(stored["e.w_blocks"], stored["e.w_scales"])
    assert source.spec("e.w").shape == (3, 96, 10)
    check_reads(source, "e.w", exact.flatten(0, 1))


def check_reads(source: Any, name: str, exact: torch.Tensor) -> None:
    """exact: [R, C] in bf16."""
    wide = exact.shape[1]
    with Files() as files:
        assert torch.equal(read_tensor(source, name, files).view(exact.shape).bfloat16(), exact)
        for rows, columns in (((3, 17), (0, wide)), ((4, 5), (3, wide - 1)), ((2, 19), (5, wide)), ((0, 21), (1, 8))):
            out = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
            out = out.view(-1) if columns == (0, wide) or len(out) == 1 else out
            source.read(name, rows[0] * wide + columns[0], out, files)
            expected = exact[slice(*rows), slice(*columns)]
            assert torch.equal(out.view(expected.shape).bfloat16(), expected)


def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "hf"
    made(directory, "gpt_oss:square", {"quant_method": "mxfp4"})
    tensors, name = load_file(directory / "model.safetensors"), "model.layers.1.mlp.experts.down_proj"
    changes: list[tuple[dict[str, Any], str]] = [
        ({f"{name}_scales": None}, f"{name}_blocks in .* is packed, but {name}_scales is missing"),
        ({f"{name}_blocks": None}, f"{name}_scales in .* belongs to no packed weight"),
        ({f"{name}_scales": tensors[f"{name}_scales"][:, 1:].clone()}, r"must be \[E, R, G, 16\] and \[E, R, G\]"),
    ]
    for change, message in changes:
        changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(changed, directory / "model.safetensors")
        words = ["--model", str(directory), "--to_mcore", "true", "--output_dir", str(tmp_path / "out")]
        assert main(["export", *words]) == 1
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("change", [{"num_bits": 8}, {"symmetric": False}, {"actorder": "group"}])
def test_other_ways_to_pack_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    weights = {**WEIGHTS, **change}
    quantisation = {**INT4, "config_groups": {"group_0": {"weights": weights}}}
    with pytest.raises(ConfigError, match="only symmetric ones of 4 bits"):
        open_source(tmp_path, {"quantization_config": quantisation})


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    """--dry_run with an index alone knows the tensors as they will be read."""
    exact = made(tmp_path / "hf", "gpt_oss:square", {"quant_method": "mxfp4"})
    file = tmp_path / "hf/model.safetensors"
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(load_file(file), "model-00001-of-00001.safetensors"),
    }
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    planned = Checkpoint.open(tmp_path / "hf", weights=False)
    assert {name: planned.shape_of(name) for name in planned.names} == {n: tuple(t.shape) for n, t in exact.items()}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_memory_is_bounded(packed: bool, tmp_path: Path) -> None:
    """Experts of 100 MB in two transposed tensors, with a budget of 24 MB, there and back."""
    changes = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    config = {**config_of("gpt_oss:square"), **changes}
    bound, tensors = bind_map(config), {}
    for name in bound.stored_names:
        shape = bound.shape(name)
        if packed and len(shape) == 3:
            tensors[f"{name}_blocks"] = torch.ones(shape[0], shape[2], shape[1] // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.ones(shape[0], shape[2], shape[1] // 32, dtype=torch.uint8)
        else:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    hf.mkdir()
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    quantisation = {"quantization_config": {"quant_method": "mxfp4"}} if packed else {}
    (hf / "config.json").write_text(json.dumps({**config, **quantisation}))
    for flags in (["--model", hf, "--to_mcore", mcore], ["--mcore_model", mcore, "--to_hf", tmp_path / "back"]):
        words = [*map(str, flags[:3]), "true", "--output_dir", str(flags[3]), "--max_memory", "24MB"]
        command = [sys.executable, "-c", MEASURE, *words]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        assert int(result.stdout.split()[-1]) < 60_000_000, result.stdout
