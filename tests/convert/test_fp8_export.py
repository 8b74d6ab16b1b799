"""FP8 directories: the nearest numbers, what loaders make of them, FP8 sources that come back byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.cli.main import main
from swiftlite.convert.quantised import check_rounding
from swiftlite.utils.errors import CheckpointError, UsageError, VerifyError
from swiftlite.weights.fp8 import Scales, open_source
from swiftlite.weights.quantise import FORMS, Quantised, scale_name
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files, read_tensor
from tests.families.cases import build_hf, config_of

BLOCKS = {"block": (128, 128), "channel": (1, 10**9), "tensor": (10**9, 10**9)}
CODES = torch.arange(256).byte().view(torch.float8_e4m3fn).double()
LEVELS = CODES[CODES.isfinite()].unique()


def blocks_of(weight: torch.Tensor, form: str) -> list[tuple[slice, slice]]:
    high, wide = BLOCKS[form]
    starts = [range(0, size, min(step, size)) for size, step in zip(weight.shape, (high, wide), strict=True)]
    return [(slice(r, r + high), slice(c, c + wide)) for r in starts[0] for c in starts[1]]


def random_codes(*shape: int) -> torch.Tensor:
    """Any number but NaN."""
    return (torch.randint(127, shape) + 128 * torch.randint(2, shape)).byte().view(torch.float8_e4m3fn)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_the_nearest(form: str, tmp_path: Path) -> None:
    """Blocks that are cut on both edges, one of zeros, magnitudes from tiny to large; any rectangle as the whole."""
    torch.manual_seed(1)
    weight = (torch.randn(200, 300) * 10.0 ** torch.randint(-4, 3, (200, 1))).bfloat16()
    weight[128:, 256:] = 0
    weight[3, 5], weight[7] = -0.0, 1e-39
    save_file({"a.weight": weight, "a.bias": weight[0].clone()}, tmp_path / "model.safetensors")
    source = Quantised(SafetensorsSource(tmp_path), ["a.weight"], form)
    with Files() as files:
        found, scale, bias = (
            read_tensor(source, n, files) for n in ("a.weight", scale_name("a.weight", form), "a.bias")
        )
        part = torch.empty(50, 170, dtype=found.dtype)
        source.read("a.weight", 101 * 300 + 77, part, files)
    assert torch.equal(bias, weight[0]) and torch.equal(bytes_of(part), bytes_of(found[101:151, 77:247]))
    blocks, scales = blocks_of(weight, form), scale.flatten().tolist()
    assert len(blocks) == len(scales)
    for (rows, columns), each in zip(blocks, scales, strict=True):
        block, codes = weight[rows, columns].double(), found[rows, columns].double()
        largest = block.abs().max()
        assert each == (1.0 if largest == 0 else max(float(largest.float() / 448), torch.finfo(torch.float32).tiny))
        nearest = (LEVELS * each - block.unsqueeze(-1)).abs().amin(-1)
        assert bool(((codes * each - block).abs() <= nearest * (1 + 1e-5)).all())
        assert largest < 1e-30 or codes.abs().max() == 448
    assert bytes_of(found)[3, 5] == 0x80, "minus zero"


def test_numbers_that_fp8_lacks_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([[1.0, torch.inf]])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a.weight holds numbers that are not finite"), Files() as files:
        read_tensor(Quantised(SafetensorsSource(tmp_path), ["a.weight"], "block"), "a.weight", files)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GLM-4.5 in bf16, of whose blocks some are whole, and its Megatron checkpoint."""
    hf = tmp_path_factory.mktemp("plain")
    changes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "torch_dtype": "bfloat16"}
    build_hf({**config_of("glm4_5:default"), **changes}, hf, dtype=torch.bfloat16)
    words = ["export", "--model", str(hf), "--model_type", "glm4_5", "--to_mcore", "true"]
    assert main([*words, "--output_dir", f"{hf}-mcore"]) == 0
    return hf, Path(f"{hf}-mcore")


@pytest.mark.parametrize("form", FORMS)
def test_loaders_read_what_is_written(form: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    """From either format the same files, of which transformers (with compressed-tensors) makes the dequantised model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config

    if form != "block":
        pytest.importorskip("compressed_tensors")
    common = [
        "export",
        "--model_type",
        "glm4_5",
        "--to_hf",
        "true",
        "--fp8",
        form,
        "--verify",
        "bitwise",
        "--output_dir",
    ]
    for number, flag in enumerate(("--model", "--mcore_model")):
        assert main([*common, str(tmp_path / flag), flag, str(plain[number])]) == 0
    written = tmp_path / "--model"
    for name in ("model.safetensors", "config.json"):
        assert (written / name).read_bytes() == (tmp_path / "--mcore_model" / name).read_bytes()
    config, tensors = read_config(written), load_file(written / "model.safetensors")
    assert config["torch_dtype"] == "bfloat16"
    quantised = {name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    original = load_file(plain[0] / "model.safetensors")
    kept = ("embed_tokens", "head", ".gate.", "eh_proj")
    assert quantised == {n for n, v in original.items() if v.dim() == 2 and not any(word in n for word in kept)}
    settings = config["quantization_config"]
    listed = settings["modules_to_not_convert" if form == "block" else "ignore"]
    assert {"lm_head", "model.embed_tokens", "model.norm", "model.layers.1.mlp.gate"} <= set(listed)
    assert not set(listed) & {name.removesuffix(".weight") for name in quantised}
    assert (written / "model.safetensors").stat().st_size < 0.7 * (plain[0] / "model.safetensors").stat().st_size

    source = Checkpoint.open(written).source
    dequantised = (
        FineGrainedFP8Config(dequantize=True) if form == "block" else CompressedTensorsConfig(run_compressed=False)
    )
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(written, dtype=torch.bfloat16, quantization_config=dequantised).float()
    state = model.state_dict()
    seen = 0
    with Files() as files:
        for name in quantised & state.keys():
            values = source.decode(name, 0, 0, read_tensor(source, name, files)).bfloat16()
            assert torch.equal(state[name].bfloat16(), values), name
            seen += 1
    assert seen > 10
    ids = torch.arange(1, 200)[None]
    reference = load(plain[0], dtype=torch.float32)(input_ids=ids).logits
    off = (model(input_ids=ids).logits - reference).norm() / reference.norm()
    assert 1e-3 < off < 0.1, off


def fp8_source(directory: Path, form: str, kind: torch.dtype) -> None:
    """A checkpoint whose scales follow from nothing that is in its weights: numbers are random, scales are too."""
    config = {**config_of("qwen3:default"), "hidden_size": 144, "intermediate_size": 200, "torch_dtype": "bfloat16"}
    build_hf(config, directory, dtype=torch.bfloat16)
    stored, high, wide = {}, *BLOCKS[form]
    for name, tensor in load_file(directory / "model.safetensors").items():
        stored[name] = tensor
        if tensor.dim() == 2 and "layers.1.mlp" not in name and ".layers." in name:  # layer 1 is plain here
            stored[name] = random_codes(*tensor.shape)
            size = tuple(-(-n // min(n, b)) for n, b in zip(tensor.shape, (high, wide), strict=True))
            scale = torch.rand(size) * 1e-3 + 1e-4
            scale = 2.0 ** scale.log2().round() if kind == torch.float8_e8m0fnu else scale
            stored[scale_name(name, form)] = scale.to(kind).view((1,) if form == "tensor" else size)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["x"]}
    if form != "block":
        group = {"weights": {"num_bits": 8, "strategy": form}, "targets": ["re:.*"]}
        settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}
    written = read_config(directory)
    (directory / "config.json").write_text(json.dumps({**written, "quantization_config": settings}))


SOURCES = [("block", torch.float32), ("block", torch.bfloat16), ("block", torch.float8_e8m0fnu),
           ("channel", torch.float32), ("channel", torch.bfloat16), ("tensor", torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), SOURCES)
def test_an_fp8_source_comes_back_byte_for_byte(form: str, kind: torch.dtype, tmp_path: Path) -> None:
    """Its scales go along, and stay where they still give every number."""
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    fp8_source(hf, form, kind)
    common = ["export", "--model_type", "qwen3", "--verify", "bitwise"]
    assert main([*common, "--model", str(hf), "--to_mcore", "true", "--output_dir", str(mcore)]) == 0
    shutil.copytree(mcore, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/carried")
    expected = load_file(hf / "model.safetensors")
    sources = {
        "from-mcore": ["--mcore_model", mcore],
        "from-hf": ["--model", hf],
        "beside-hf": ["--mcore_model", tmp_path / "bare", "--model", hf],  # trained elsewhere, its source is there
    }
    for name, flags in sources.items():
        words = [*common, *map(str, flags), "--to_hf", "true", "--fp8", form, "--output_dir", str(tmp_path / name)]
        assert main(words) == 0
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert found[tensor].dtype == value.dtype and torch.equal(bytes_of(found[tensor]), bytes_of(value)), tensor
        assert read_config(tmp_path / name)["quantization_config"] == read_config(hf)["quantization_config"]
    if kind == torch.float8_e8m0fnu:  # which follow from the largest number, 448 times a power of two
        return
    words = [*common, "--mcore_model", str(tmp_path / "bare"), "--to_hf", "true", "--fp8", form]
    assert main([*words, "--output_dir", str(tmp_path / "lost")]) == 0
    lost = load_file(tmp_path / "lost/model.safetensors")
    scales = [name for name in expected if "_scale" in name]
    assert scales and all(not torch.equal(lost[name], expected[name]) for name in scales), "they do not follow"


@pytest.mark.parametrize("kind", [torch.float32, torch.float8_e8m0fnu])
def test_a_changed_block_gets_a_scale_of_its_own(kind: torch.dtype, tmp_path: Path) -> None:
    codes = random_codes(200, 300)
    scale = (2.0 ** torch.randint(-12, -8, (2, 3))).to(kind)
    whole = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    weight = (codes.float() * whole).bfloat16()
    weight[150, 5] += 1.0
    (tmp_path / "scales").mkdir()
    save_file({"a.weight": weight}, tmp_path / "model.safetensors")
    save_file({"a.weight_scale_inv": scale}, tmp_path / "scales/model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    kept = Scales.among(SafetensorsSource(tmp_path / "scales"), settings)
    source = Quantised(SafetensorsSource(tmp_path), ["a.weight"], "block", kept)
    with Files() as files:
        found, scales = (read_tensor(source, name, files) for name in ("a.weight", "a.weight_scale_inv"))
    assert scales.dtype == kind
    same = torch.ones(2, 3, dtype=torch.bool)
    same[1, 0] = False
    assert torch.equal(scales.float() == scale.float(), same)
    largest = weight[128:, :128].float().abs().max() / 448
    assert scales[1, 0].float() == (largest if kind == torch.float32 else 2 ** largest.log2().ceil())
    unchanged = bytes_of(found) == bytes_of(codes)
    assert bool(unchanged[:128].all()) and bool(unchanged[:, 128:].all()) and not bool(unchanged[128:, :128].all())


def test_a_number_that_is_off_is_found(plain: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["export", "--model", str(plain[0]), "--model_type", "glm4_5", "--to_hf", "true", "--fp8", "block"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    source = open_source(plain[0], read_config(plain[0]))
    check_rounding(source, tmp_path / "out")
    tensors, name = load_file(tmp_path / "out/model.safetensors"), "model.layers.2.self_attn.o_proj.weight"
    bytes_of(tensors[name])[3, 7] += 1  # the next number
    save_file(tensors, tmp_path / "out/model.safetensors")
    with pytest.raises(VerifyError, match=f"{name}: a number is .* half steps"):
        check_rounding(source, tmp_path / "out")


def test_names_of_other_tools(plain: tuple[Path, Path], tmp_path: Path) -> None:
    """`swift export --quant_method fp8`, `megatron export --fp8_recipe blockwise`: what --fp8 block writes."""
    ways = {
        "block": ["export", "--to_hf", "true", "--fp8", "block"],
        "swift": ["export", "--quant_method", "fp8"],
        "mcore": ["megatron", "export", "--to_hf", "true", "--fp8_recipe", "blockwise", "--fp8_format", "e4m3",
                  "--fp8_param_gather", "true", "--tensor_model_parallel_size", "2"],
    }  # fmt: skip
    common = ["--model", str(plain[0]), "--model_type", "glm4_5", "--output_dir"]
    written = []
    for name, words in ways.items():
        assert main([*words, *common, str(tmp_path / name)]) == 0
        written.append([(tmp_path / name / file).read_bytes() for file in ("model.safetensors", "config.json")])
    assert written[0] == written[1] == written[2]
    for flags, said in [(["--quant_method", "gptq"], "export bf16"), (["--fp8_recipe", "mxfp8"], "; use block")]:
        with pytest.raises(UsageError, match=said):
            parse(ExportArguments, flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to_mcore", "true"], "writes a Hugging Face model"),
        (["--push_to_hub", "true", "--hub_model_id", "a/b"], "writes a Hugging Face model"),
        (["--to_hf", "true", "--test_convert_precision", "true"], "rounds weights, so the models differ"),
        (["--to_hf", "true", "--adapters", "."], "writes a Hugging Face model"),
    ],
)
def test_what_does_not_go_together(
    flags: list[str], message: str, plain: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--model", str(plain[0]), "--fp8", "block", *flags]) == 2
    assert message in capsys.readouterr().err


def test_experts_with_biases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_hf({**config_of("gpt_oss:square")}, tmp_path / "hf")
    assert main(["export", "--model", str(tmp_path / "hf"), "--to_hf", "true", "--fp8", "block"]) == 1
    assert "experts with biases are read by no loader" in capsys.readouterr().err


def test_merged_weights_are_quantised(plain: tuple[Path, Path], tmp_path: Path) -> None:
    module = "model.layers.1.self_attn.o_proj"
    original = load_file(plain[0] / "model.safetensors")[f"{module}.weight"].float()
    a, b = torch.randn(4, original.shape[1]), torch.randn(original.shape[0], 4)
    (tmp_path / "peft").mkdir()
    pair = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(pair, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    words = ["--model", str(plain[0]), "--model_type", "glm4_5", "--adapters", str(tmp_path / "peft")]
    words += ["--merge_lora", "true", "--fp8", "channel", "--output_dir", str(tmp_path / "out")]
    assert main(["export", *words]) == 0
    tensors, merged = load_file(tmp_path / "out/model.safetensors"), original + 2 * b @ a
    scale = tensors[f"{module}.weight_scale"]
    torch.testing.assert_close(scale, merged.abs().amax(1, keepdim=True) / 448)
    torch.testing.assert_close(tensors[f"{module}.weight"].float() * scale, merged, rtol=2**-4, atol=1e-2)
