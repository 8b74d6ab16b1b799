"""Text parts of models that read images too: equal to the plain text model, trained as one, everything else carried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.cli.main import main
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.families.hf_config import convert_hf_config
from swiftlite.selftest.precision import check_precision
from swiftlite.selftest.shrink import text_alone
from swiftlite.utils.directories import CARRIED
from swiftlite.utils.errors import CheckpointError, MapError
from swiftlite.weights.rule import NAMINGS, text_name
from swiftlite.weights.torch_dist import HfNames
from tests.families.cases import build_hf, config_of
from tests.rows import CHAT, FLAGS, PAIRS, losses

TYPES = (
    "qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "gemma3", "mistral3", "glm4v", "llama4", "glm4_5v", "kimi_k25", "qwen3_5",
)  # fmt: skip
QUIET = Options(quiet=True)


def is_text(name: str) -> bool:
    return "language_model" in name or name.startswith(("model.layers", "model.embed", "model.norm", "lm_head", "mtp."))


def write_text_alone(directory: Path, target: Path) -> dict[str, Any]:
    """The text part of a wrapper's directory as a model of its own. Returns: its config."""
    config = text_alone(json.loads((directory / "config.json").read_text()))
    tensors = load_file(directory / "model.safetensors")
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    text = {text_name(n): tensor for n, tensor in tensors.items() if is_text(n)}
    save_file(text, target / "model.safetensors", {"format": "pt"})
    return config


@pytest.mark.parametrize("kind", TYPES)
def test_the_text_part_is_the_plain_text_model(kind: str, tmp_path: Path) -> None:
    """transformers' logits are equal to 0.0, and so is every byte of Megatron's checkpoint."""
    from transformers import AutoModelForCausalLM, __version__

    whole, text = tmp_path / "whole", tmp_path / "text"
    model = build_hf(config_of(f"{kind}:default"), whole)
    config = write_text_alone(whole, text)
    assert convert_hf_config(config) == convert_hf_config(json.loads((whole / "config.json").read_text()))
    ids = torch.randint(0, 290, (2, 40), generator=torch.Generator().manual_seed(0))
    if kind != "qwen3_vl_moe" or not __version__.startswith("4."):  # whose Qwen3-MoE knows no experts in one tensor
        plain = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    for directory in (whole, text):
        convert(Checkpoint.open(directory), McoreTarget(), tmp_path / f"{directory.name}-mcore", QUIET)
    stored = {path.name: path.read_bytes() for path in (tmp_path / "text-mcore/iter_0000001").glob("*.distcp")}
    assert stored == {path.name: path.read_bytes() for path in (tmp_path / "whole-mcore/iter_0000001").glob("*.distcp")}


@pytest.mark.parametrize("naming", NAMINGS, ids=["new", "old", "beside"])
def test_names_of_every_generation(naming: Any, tmp_path: Path) -> None:
    """Whatever the files call the text part, they come back so, with all that is not text, its dtypes and other files."""
    hf, mcore, back = (tmp_path / name for name in ("hf", "mcore", "back"))
    config = config_of("qwen3_vl:default")
    untied = {"tie_word_embeddings": False}
    build_hf({**config, "text_config": {**config["text_config"], **untied}, **untied}, hf)
    tensors = load_file(hf / "model.safetensors")
    renamed = {naming(text_name(n)) if is_text(n) else n.removeprefix("model."): t for n, t in tensors.items()}
    renamed["visual.steps"] = torch.arange(7)  # numbers of any kind
    renamed["visual.half"] = torch.randn(3, 5).half()
    save_file(renamed, hf / "model.safetensors", {"format": "pt"})
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"):
        (hf / name).write_text(f'{{"of": "{name}"}}')
    words = ["--verify", "bitwise", "--test_convert_precision", "true"]
    assert main(["export", "--model", str(hf), "--to_mcore", "true", *words, "--output_dir", str(mcore)]) == 0
    assert not any(is_text(name) for name in load_file(mcore / CARRIED / "model.safetensors"))
    shutil.move(hf, tmp_path / "gone")
    assert main(["export", "--mcore_model", str(mcore), "--to_hf", "true", *words[:2], "--output_dir", str(back)]) == 0
    for path in (tmp_path / "gone").iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    assert main(["verify", str(tmp_path / "gone"), str(mcore)]) == 0
    # Other dtypes are for the text; and without a manifest the tensors are still there.
    (mcore / "manifest.json").unlink()
    convert(Checkpoint.open(mcore), HfTarget(torch.bfloat16), tmp_path / "cast", QUIET)
    cast = load_file(tmp_path / "cast/model.safetensors")
    assert {text_name(n) for n in cast} == {text_name(n) for n in renamed}
    for name, tensor in renamed.items():
        if not is_text(name):
            assert torch.equal(cast[name], tensor) and cast[name].dtype == tensor.dtype


def test_experts_kept_either_way(tmp_path: Path) -> None:
    """Releases of Qwen3-VL have [E, in, out], what transformers 5 saves [E, out, in]; each comes back as it was."""
    build_hf(config_of("qwen3_vl_moe:default"), tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    tensors = load_file(tmp_path / "one/model.safetensors")
    turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
    save_file(turned, tmp_path / "two/model.safetensors", {"format": "pt"})
    stored = []
    for name in ("one", "two"):
        hf, mcore, back = (tmp_path / f"{name}{step}" for step in ("", "-mcore", "-back"))
        convert(Checkpoint.open(hf), McoreTarget(num_files=1), mcore, QUIET)
        convert(Checkpoint.open(mcore), HfTarget(), back, QUIET)
        assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
        check_precision(hf, mcore)
        stored.append((mcore / "iter_0000001/__0_0.distcp").read_bytes())
    assert stored[0] == stored[1]


def test_what_is_amiss_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf, mcore = tmp_path / "hf", tmp_path / "mcore"
    build_hf(config_of("mistral3:default"), hf)
    convert(Checkpoint.open(hf), McoreTarget(), mcore, QUIET)
    words = ["export", "--mcore_model", str(mcore), "--to_hf", "true", "--output_dir", str(tmp_path / "back")]
    assert main([*words, "--dry_run", "true"]) == 0
    assert main(["export", "--model", str(hf), "--to_mcore", "true", "--dry_run", "true"]) == 0
    assert "carried: vision_tower.patch_conv.weight [16, 3, 2, 2] float32" in capsys.readouterr().out

    carried = mcore / CARRIED / "model.safetensors"
    tensors = load_file(carried)
    save_file({n: t for n, t in tensors.items() if "projector.norm" not in n}, carried)
    with pytest.raises(CheckpointError, match=r"carried lacks multi_modal_projector.norm.weight \(1 such"):
        Checkpoint.open(mcore)
    shutil.rmtree(mcore / CARRIED)
    assert main(words) == 1
    assert "holds the text part of Mistral3ForConditionalGeneration alone" in capsys.readouterr().err
    assert main([*words, "--model", str(hf)]) == 0  # which still has the others
    assert (tmp_path / "back/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()

    stored = load_file(hf / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    for change, message in (
        ({name.replace("1.mlp", "9.mlp"): stored[name].clone()}, "unknown tensor: language_model.model.layers.9.mlp"),
        ({name: None}, f"missing tensor: {name}"),
    ):
        changed = {n: t for n, t in {**stored, **change}.items() if t is not None}
        save_file(changed, hf / "model.safetensors")
        with pytest.raises(MapError, match=message):
            Checkpoint.open(hf)
    assert isinstance(Checkpoint.open(mcore).source, HfNames)


# ---- training ----


@pytest.fixture
def made(tmp_path: Path, tiny_tokenizer_dir: Path) -> Callable[[str], Path]:
    """A wrapper's directory with tokenizer, chat template and processor."""

    def make(kind: str) -> Path:
        directory = tmp_path / kind
        build_hf(config_of(f"{kind}:default"), directory)
        for file in tiny_tokenizer_dir.iterdir():
            shutil.copy(file, directory)
        (directory / "chat_template.jinja").write_text(CHAT)
        (directory / "preprocessor_config.json").write_text('{"patch_size": 2}')
        return directory

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS)
    return path


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "gemma3", "mistral3"])
def test_text_is_trained_and_the_rest_stays(kind: str, made: Any, rows: Path, tmp_path: Path) -> None:
    """Both sides alike; a run's Megatron checkpoint becomes the whole model again without its original."""
    hf = made(kind)
    before = load_file(hf / "model.safetensors")
    words = ["--model", str(hf), "--dataset", str(rows), *FLAGS]
    assert main(["sft", *words, "--output_dir", str(tmp_path / "llm")]) == 0
    assert main(["megatron", "sft", *words, "--save_safetensors", "true", "--output_dir", str(tmp_path / "mega")]) == 0
    assert losses(tmp_path / "mega") == pytest.approx(losses(tmp_path / "llm"), rel=1e-4)
    config = json.loads((hf / "config.json").read_text())
    shutil.rmtree(hf)
    out = tmp_path / "out"
    assert main(["export", "--mcore_model", str(tmp_path / "mega"), "--to_hf", "true", "--output_dir", str(out)]) == 0
    for directory in (tmp_path / "llm/checkpoint-2", tmp_path / "mega/iter_0000002-hf", out):
        after = load_file(directory / "model.safetensors")
        assert after.keys() == before.keys(), directory
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor) != is_text(name), f"{name} in {directory}"
        stated = json.loads((directory / "config.json").read_text())
        assert stated["text_config"].get("rope_scaling") == config["text_config"].get("rope_scaling")
        assert stated["vision_config"].items() >= config["vision_config"].items()
        assert (directory / "preprocessor_config.json").is_file() and (directory / "chat_template.jinja").is_file()


@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral3"])
def test_adapters_are_of_the_text_part(kind: str, made: Any, rows: Path, tmp_path: Path) -> None:
    """One name for a layer on both sides and for peft, whatever the files call it; merged by either command."""
    from peft import PeftModel

    from swiftlite.llm.model.loader import auto_class

    hf = made(kind)
    base = ["--model", str(hf)]
    words = [
        *base,
        "--dataset",
        str(rows),
        *FLAGS,
        "--train_type",
        "lora",
        "--lora_dropout",
        "0",
    ]
    assert main(["sft", *words, "--output_dir", str(tmp_path / "llm")]) == 0
    assert main(["megatron", "sft", *words, "--output_dir", str(tmp_path / "mega")]) == 0
    assert losses(tmp_path / "mega") == pytest.approx(losses(tmp_path / "llm"), rel=1e-4)
    adapters = [tmp_path / "llm/checkpoint-2", tmp_path / "mega/iter_0000002"]
    pairs = [load_file(path / "adapter_model.safetensors") for path in adapters]
    assert pairs[0].keys() == pairs[1].keys()
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in pairs[0])

    merged, whole = tmp_path / "merged", load_file(hf / "model.safetensors")
    add = ["export", *base, "--adapters", str(adapters[1]), "--merge_lora", "true"]
    assert main([*add, "--output_dir", str(merged)]) == 0
    found = load_file(merged / "model.safetensors")
    changed = {name for name in whole if not torch.equal(found[name], whole[name])}
    assert changed == {name for name in whole if is_text(name) and "_proj.weight" in name}

    build = auto_class(json.loads((hf / "config.json").read_text()))
    ids = torch.randint(0, 290, (1, 30))
    model, own = (build.from_pretrained(directory, dtype=torch.float32).eval() for directory in (merged, hf))
    adapted = PeftModel.from_pretrained(own, adapters[1])
    assert not any("lora" in n and "language_model" not in n for n, _ in adapted.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_preferences_and_rows_with_images(
    made: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(made("qwen2_5_vl")), *FLAGS]
    for command in (["dpo"], ["megatron", "dpo"]):
        out = tmp_path / command[0]
        assert main([*command, *words, "--dataset", str(rows), "--output_dir", str(out)]) == 0
        assert losses(out)[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses(tmp_path / "megatron") == pytest.approx(losses(tmp_path / "dpo"), rel=1e-4)
    image = {"type": "image_url", "image_url": {"url": "fox.png"}}
    question = [{"type": "text", "text": "What?"}, image]
    answer = {"role": "assistant", "content": "A fox."}
    for number, row in enumerate((
        {"messages": [{"role": "user", "content": "<image>What?"}, answer], "images": ["fox.png"]},
        {"messages": [{"role": "user", "content": question}, answer]},
    )):  # fmt: skip
        data = tmp_path / f"{number}.jsonl"
        data.write_text(json.dumps(row) + "\n")
        for command in (["sft"], ["megatron", "sft"]):
            out = str(tmp_path / f"{number}-{command[0]}")
            assert main([*command, *words, "--dataset", str(data), "--output_dir", out]) == 1
            assert "image" in capsys.readouterr().err
