"""`swiftlite export` as a user runs it: both directions, the files around the weights, and what bad input gets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.cli.main import main
from swiftlite.convert.hf import HfTarget
from swiftlite.utils.directories import find_iteration


def export(*words: str | Path) -> int:
    return main(["export", *map(str, words)])


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny GLM-4.5 in a directory of its own that a test may spoil."""
    return Path(shutil.copytree(tiny_model("glm4_moe"), tmp_path / "GLM-4.5-Air"))


@pytest.fixture
def converted(model: Path, tmp_path: Path) -> Path:
    assert export("--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "mcore") == 0
    return tmp_path / "mcore"


def test_there_and_back_with_the_precision_check(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, syncs: Any
) -> None:
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    flags = ("--test_convert_precision", "true")
    assert export("--model", model, "--to_mcore", "true", "--output_dir", mcore, *flags) == 0
    assert export("--mcore_model", mcore, "--to_hf", "true", "--output_dir", back, *flags) == 0
    assert syncs.unsynced(mcore) == syncs.unsynced(back) == []
    assert (back / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert (back / "config.json").read_bytes() == (model / "config.json").read_bytes()
    for file in model.iterdir():
        assert (back / file.name).is_file(), file.name


def test_what_a_converted_checkpoint_holds(model: Path, converted: Path) -> None:
    names = {p.relative_to(converted).as_posix() for p in converted.rglob("*") if p.is_file()}
    assert names >= {
        "latest_checkpointed_iteration.txt", "iter_0000001/.metadata", "iter_0000001/common.pt",
        "iter_0000001/metadata.json", "iter_0000001/__0_0.distcp", "iter_0000001/__0_1.distcp", "args.json",
        "config.json", "tokenizer.json", "manifest.json", "megatron_lm_args.txt",
    }  # fmt: skip
    assert (converted / "latest_checkpointed_iteration.txt").read_text() == "1"
    common = torch.load(converted / "iter_0000001/common.pt", weights_only=True)
    assert common["iteration"] == 1 and common["checkpoint_version"] == 3.0
    assert common["args"].num_layers == json.loads((model / "config.json").read_text())["num_hidden_layers"]
    assert json.loads((converted / "args.json").read_text())["model_type"] == "glm4_5"
    assert "--num-layers" in (converted / "megatron_lm_args.txt").read_text()


def test_dtype_conversion_casts_all_but_the_router_bias(model: Path, tmp_path: Path) -> None:
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    assert export("--model", model, "--to_mcore", "true", "--torch_dtype", "bfloat16", "--output_dir", mcore) == 0
    assert export("--mcore_model", mcore, "--to_hf", "true", "--output_dir", back) == 0
    original, result = load_file(model / "model.safetensors"), load_file(back / "model.safetensors")
    for name, tensor in original.items():
        kept = "e_score_correction_bias" in name
        assert torch.equal(result[name], tensor if kept else tensor.bfloat16()), name
    config = json.loads((back / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_max_shard_size_makes_several_files(converted: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert export("--mcore_model", converted, "--to_hf", "true", "--max_shard_size", "200KB", "--output_dir", back) == 0
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(back)


def test_dry_run_prints_the_plan_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--model", model, "--to_mcore", "true", "--dry_run", "true", "--output_dir", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "decoder.layers.0.mlp.linear_fc1.weight <- model.layers.0.mlp.gate_proj.weight + " in printed
    assert not (tmp_path / "out").exists()


def _edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def _index(directory: Path) -> None:
    """Split the model in two files and lose one."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({n: tensors[n] for n in part}, directory / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    (directory / "b.safetensors").unlink()


def _config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


Q = "model.layers.0.self_attn.q_proj.weight"
SPOILERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (_index, "lists b.safetensors, which is not there"),
    "truncated shard": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]), "is truncated"),
    "unknown tensor": (
        lambda d: _edit(d, lambda t: t.update({"model.extra": torch.ones(2)})), "unknown tensor: model.extra"),
    "missing tensor": (lambda d: _edit(d, lambda t: t.pop(Q)), f"missing tensor: {Q}"),
    "wrong shape": (lambda d: _edit(d, lambda t: t.update({Q: t[Q][1:]})), f"{Q} in .* has shape"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), "config.json"),
    "architecture unknown": (
        lambda d: _config(d, architectures=["FooForCausalLM"], model_type="foo"), "FooForCausalLM"),
    "other activation": (lambda d: _config(d, hidden_act="gelu"), "hidden_act 'gelu' is not 'silu'"),
    "sliding window": (lambda d: _config(d, use_sliding_window=True), "sliding window"),
    "not normalised": (lambda d: _config(d, norm_topk_prob=False), "norm_topk_prob false with a sigmoid router"),
    "classifier": (lambda d: _config(d, architectures=["Glm4MoeForSequenceClassification"]), "missing tensor: score.weight"),
    "quantised": (lambda d: _config(d, quantization_config={"quant_method": "gptq"}), "gptq"),
}  # fmt: skip


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_bad_input_is_one_line_and_leaves_nothing(
    spoiler: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = SPOILERS[spoiler]
    spoil(model)
    code = export("--model", model, "--to_mcore", "true", "--output_dir", tmp_path / "out")
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code != 0 and len(errors) == 1
    import re

    assert re.search(message, errors[0]), errors[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GLM-4.5-Air"]


def _last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return [line for line in capsys.readouterr().err.splitlines() if "error:" in line][-1]


def test_existing_output_directory_is_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert export("--model", model, "--to_mcore", "true", "--output_dir", out) == 2
    assert "exists already" in _last_error(capsys) and (out / "mine.txt").read_text() == "precious"
    assert export("--model", model, "--to_mcore", "true", "--output_dir", out, "--exist_ok", "true") == 2
    assert "not an output of `swiftlite export`" in _last_error(capsys) and (out / "mine.txt").read_text() == "precious"
    (out / "mine.txt").unlink()
    for _ in range(2):  # a conversion's own output is replaced
        assert export("--model", model, "--to_mcore", "true", "--output_dir", out, "--exist_ok", "true") == 0
    assert (out / "args.json").is_file() and not list(tmp_path.glob(".out*"))


def test_what_is_read_is_not_replaced(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is such an output itself."""
    words = ("--mcore_model", converted, "--to_hf", "true", "--exist_ok", "true", "--output_dir")
    monkeypatch.chdir(converted)
    for path in (converted, converted.parent, ".", "..", converted / "iter_0000001"):
        assert export(*words, path) == 2
        assert re.search(
            "is read; name another|is the working directory or holds|replaces only what such a command",
            _last_error(capsys),
        )
    assert (converted / "config.json").is_file() and (converted / "iter_0000001/.metadata").is_file()


def test_formats_given_the_wrong_way_round(
    model: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("--mcore_model", model, "--to_hf", "true", "--output_dir", tmp_path / "x") == 1
    assert "is a Hugging Face directory; give it with --model" in _last_error(capsys)
    assert export("--model", converted, "--to_mcore", "true", "--output_dir", tmp_path / "x") == 1
    assert "--mcore_model" in _last_error(capsys)
    assert not (tmp_path / "x").exists()


def test_unknown_model_type_and_flag(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("--model", model, "--to_mcore", "true", "--model_type", "glm5", "--output_dir", tmp_path / "x") == 2
    assert "glm5" in _last_error(capsys)
    assert export("--model", model, "--to_mcor", "true") == 2
    assert "--to_mcore" in _last_error(capsys)
    assert export("--model", model) == 2
    assert "nothing to do: give --to_mcore, --to_hf" in _last_error(capsys)


def test_a_corrupt_conversion_fails_the_command_and_leaves_nothing(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the converter itself: k and v exchanged. The precision check stops the command before the rename."""
    original = HfTarget.plan

    def faulty(target: HfTarget, source: Any) -> Any:
        plan = original(target, source)
        k, v = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
        source.copies.update({k: v, v: k})
        return plan

    monkeypatch.setattr(HfTarget, "plan", faulty)
    out = tmp_path / "back"
    flags = ("--test_convert_precision", "true", "--output_dir", out)
    assert export("--mcore_model", converted, "--to_hf", "true", *flags) == 1
    assert "layer 1 is off" in _last_error(capsys)
    assert not out.exists() and not list(tmp_path.glob(".back*"))


def test_tied_model_that_stores_its_head(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(tiny_model("qwen3", tie_word_embeddings=True), tmp_path / "Qwen3-0.6B"))
    _edit(source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert export("--model", source, "--to_mcore", "true", "--output_dir", tmp_path / "mcore") == 0
    assert export("--mcore_model", tmp_path / "mcore", "--to_hf", "true", "--output_dir", tmp_path / "back") == 0
    original, back = load_file(source / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert original.keys() == back.keys() and all(torch.equal(original[n], back[n]) for n in original)
    _edit(source, lambda t: t["lm_head.weight"].add_(1))
    assert export("--model", source, "--to_mcore", "true", "--output_dir", tmp_path / "other") == 1
    assert "lm_head.weight is stored but differs from model.embed_tokens.weight" in _last_error(capsys)


def test_offline_conversion_imports_neither_megatron_nor_transformers(model: Path, tmp_path: Path) -> None:
    code = """
import sys
from swiftlite.cli.main import main
from swiftlite.convert.hf import HfTarget
model, mcore, back = sys.argv[1:]
assert main(["export", "--model", model, "--to_mcore", "true", "--output_dir", mcore]) == 0
assert main(["export", "--mcore_model", mcore, "--to_hf", "true", "--output_dir", back]) == 0
heavy = {"megatron", "transformers", "transformer_engine", "peft", "datasets", "modelscope", "trl"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "m"), str(tmp_path / "h")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]"), result.stdout


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3"])
def test_new_special_tokens_grow_the_vocabulary(family: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """New rows are the mean of the old ones in both matrices; the precision check compares with the grown model."""
    tied = {"tie_word_embeddings": True} if family == "qwen3" else {}
    source = Path(shutil.copytree(tiny_model(family, vocab_size=310, **tied), tmp_path / "m"))
    model_type = {"glm4_moe": "glm4_5", "qwen3": "qwen3"}[family]
    tokens = [f"<new_{i}>" for i in range(20)]
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    flags = ("--model_type", model_type, "--test_convert_precision", "true", "--output_dir")
    assert export("--model", source, "--to_mcore", "true", "--new_special_tokens", *tokens, *flags, mcore) == 0
    assert export("--mcore_model", mcore, "--to_hf", "true", *flags, back) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(back)
    assert len(tokenizer("<new_7>", add_special_tokens=False)["input_ids"]) == 1
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 384
    original, grown = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in original:
            assert torch.equal(grown[name][:310], original[name])
            torch.testing.assert_close(grown[name][310:], original[name].mean(0).expand(74, -1))
    assert AutoModelForCausalLM.from_pretrained(back).get_input_embeddings().weight.shape[0] == 384


def test_new_special_tokens_that_fit_change_no_weight(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model("qwen3", vocab_size=320), tmp_path / "m"))
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    flags = ("--model_type", "qwen3", "--output_dir")
    assert export("--model", source, "--to_mcore", "true", "--new_special_tokens", "<one>", *flags, mcore) == 0
    assert export("--mcore_model", mcore, "--to_hf", "true", *flags, back) == 0
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_iteration_that_is_named(converted: Path, model: Path, tmp_path: Path) -> None:
    """`RUN/iter_1` is not the newest one: training, export and verify take it."""
    from swiftlite.arguments.megatron_train import MegatronSftArguments
    from swiftlite.megatron.trainers.resolve import resolve_run

    first, second = converted / "iter_0000001", converted / "iter_0000002"
    shutil.copytree(first, second)
    for file in second.glob("*.distcp"):  # what was trained since
        file.write_bytes(file.read_bytes()[:-4000] + bytes(4000))
    (converted / "latest_checkpointed_iteration.txt").write_text("2")
    assert main(["verify", str(first), str(model)]) == 0
    assert main(["verify", str(converted), str(model)]) == 1
    assert export("--mcore_model", first, "--to_hf", "true", "--output_dir", tmp_path / "back") == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    args = MegatronSftArguments(mcore_model=str(first), dataset=["FILE"], output_dir=str(tmp_path / "run"))
    assert find_iteration(Path(resolve_run(args))) == first
    assert Path(args.model_info.model_dir) == converted


def test_the_precision_check_needs_no_decision_about_a_chat_template(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Several types of LlamaForCausalLM differ in nothing else."""
    from tests.families.cases import build_hf, config_of

    build_hf(config_of("llama:default"), tmp_path / "hf")
    for file in tiny_tokenizer_dir.iterdir():
        shutil.copy(file, tmp_path / "hf")
    flags = ("--model", tmp_path / "hf", "--to_mcore", "true", "--test_convert_precision", "true", "--output_dir")
    assert export(*flags, tmp_path / "plain") == 0
    for number, source in enumerate(("{{ messages[0].content }}", "{{ raise_exception('no') }}")):
        (tmp_path / "hf" / "chat_template.jinja").write_text(source)
        assert export(*flags, tmp_path / f"own{number}") == 0
