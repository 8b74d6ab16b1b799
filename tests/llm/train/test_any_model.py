"""Models without a family, from the command line: they train, answer and merge with transformers; Megatron says no."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from swiftlite.cli.main import main
from swiftlite.families import has_family
from swiftlite.families.hf_config import architecture_of
from tests.rows import CHAT, FLAGS, PAIRS, losses

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_SLIDING = {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# model_type -> (architecture, config besides _SIZES, layers that `all-linear` names)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
# transformers 5 has experts of this form in one tensor, which gets no adapters.
EXPERTS = {"w1", "w2", "w3"} if transformers.__version__.startswith("4.") else set()
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "cohere": ("CohereForCausalLM", {}, LLAMA),
    "falcon": ("FalconForCausalLM", {}, NEOX),
    "gpt_neox": ("GPTNeoXForCausalLM", {}, NEOX),
    "nemotron": ("NemotronForCausalLM", {}, LLAMA - {"gate_proj"}),
    "phimoe": ("PhimoeForCausalLM", _MIXTURE, ATTENTION | EXPERTS),
    "stablelm": ("StableLmForCausalLM", {}, LLAMA),
    "starcoder2": ("Starcoder2ForCausalLM", {}, ATTENTION | {"c_fc", "c_proj"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Any:
    """`made("falcon", key=value)` -> a model directory with a chat template and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, **changes: Any) -> Path:
        architecture, own, _ = MODELS[kind]
        directory = tmp_path_factory.mktemp(f"a-{kind.replace('_', '')}")
        config = {**_SIZES, "architectures": [architecture], "model_type": kind, **own, **changes}
        for file in tiny_tokenizer_dir.iterdir():
            shutil.copy(file, directory)
        (directory / "chat_template.jinja").write_text(CHAT)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.float32)
        model.save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text(PAIRS)
    return path


def tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_without_a_family_trains_answers_and_merges(
    kind: str, made: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, architecture, linear = made(kind), MODELS[kind][0], MODELS[kind][2]
    base = ["--model", str(directory)]
    words = [*base, "--dataset", str(rows), *FLAGS]
    routers = ["--moe_aux_loss_coeff", "0.01"] if kind == "phimoe" else []
    assert main(["sft", *words, *routers, "--output_dir", str(tmp_path / "full")]) == 0
    said = f"{architecture} has no Megatron mapping, transformers only" in capsys.readouterr().err
    assert said != has_family(architecture)  # those that get one do the same with transformers
    before, after = tensors(directory), tensors(tmp_path / "full/checkpoint-2")
    assert before.keys() == after.keys(), "the names of the checkpoint"
    learned = {name.split(".")[-2] for name in before if not before[name].equal(after[name])}
    assert learned >= linear

    assert main(["sft", *words, "--train_type", "lora", "--output_dir", str(tmp_path / "lora")]) == 0
    adapter = tmp_path / "lora/checkpoint-2"
    assert set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"]) == linear
    merged = tmp_path / "merged"
    add = ["export", *base, "--adapters", str(adapter), "--merge_lora", "true", "--verify", "bitwise"]
    assert main([*add, "--output_dir", str(merged)]) == 0
    found = tensors(merged)
    changed = {name.split(".")[-2] for name in before if not before[name].equal(found[name])}
    assert found.keys() == before.keys() and changed == linear

    ask = ["--prompt", "Who are you?", "--max_new_tokens", "5", "--temperature", "0", "--torch_dtype", "float32"]
    answers = []
    for model in (["--model", str(merged)], [*base, "--adapters", str(adapter)]):
        capsys.readouterr()
        assert main(["infer", *model, *ask]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", MODELS)
def test_preferences_of_a_model_without_a_family(kind: str, made: Any, rows: Path, tmp_path: Path) -> None:
    words = ["--model", str(made(kind)), "--dataset", str(rows), *FLAGS, "--output_dir", str(tmp_path / "run")]
    assert main(["dpo", *words]) == 0
    found = losses(tmp_path / "run")
    assert found[0] == pytest.approx(0.6931, abs=1e-4) and found[1] < found[0]


@pytest.mark.parametrize("command", [["megatron", "sft"], ["export", "--to_mcore", "true"]])
def test_megatron_names_the_ways_out(
    command: list[str], made: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command, "--model", str(made("starcoder2")), "--output_dir", str(tmp_path / "out")]
    assert main([*words, *(["--dataset", str(rows)] if command[0] == "megatron" else [])]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"Starcoder2ForCausalLM has no Megatron mapping yet; .*swiftlite sft, .*family file .*architecture\.md", error
    )
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_files_that_are_not_this_models_are_refused(
    made: Any, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a map, transformers' own names are the check: missing, unknown or of another shape."""
    from safetensors.torch import save_file

    directory = made("stablelm")
    whole = tensors(directory)
    name = "model.layers.0.mlp.up_proj.weight"
    left = {key: value for key, value in whole.items() if key != name}
    for changed, message in (
        (left, f"1 missing tensor: {name}"),
        ({**whole, "model.extra.weight": whole[name].clone()}, "1 unknown tensor: model.extra.weight"),
        ({**left, name: whole[name][1:].clone()}, f"{name} different shapes"),
    ):
        save_file(changed, directory / "model.safetensors", {"format": "pt"})
        assert main(["infer", "--model", str(directory), "--prompt", "Hi"]) == 1
        assert message in capsys.readouterr().err


def test_quantised_checkpoints_say_what_they_need(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A package that is not there, which transformers names; packed weights have no gradient."""
    import torch
    from torch import nn

    from swiftlite.arguments.train import SftArguments
    from swiftlite.llm.model.tuner import prepare_model
    from swiftlite.utils.errors import UsageError

    directory = made("cohere", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert main(["infer", "--model", str(directory), "--prompt", "Hi"]) == 1
    assert re.search("bitsandbytes.*; or use the unquantised checkpoint", capsys.readouterr().err)
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UsageError, match="weight is quantised and has no gradient; use --train_type lora"):
        prepare_model(model, SftArguments())


def test_rows_with_images_are_refused_by_name(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A fox."}]
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": messages, "images": ["fox.png"]}) + "\n")
    assert (
        main(
            ["sft", "--model", str(made("falcon")), "--dataset", str(data), *FLAGS, "--output_dir", str(tmp_path / "o")]
        )
        == 1
    )
    assert "images" in capsys.readouterr().err


def test_a_model_that_reads_images_learns_text(
    tmp_path: Path, tiny_tokenizer_dir: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text part is trained, merged and asked; its other parts stay as they are; rows with images are refused.

    Those that have a family: see tests/families/test_wrappers.py.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}  # fmt: skip
    model, out, merged = tmp_path / "model", tmp_path / "out", tmp_path / "merged"
    shutil.copytree(tiny_tokenizer_dir, model)
    config = AutoConfig.for_model(
        "llava", text_config={**_SIZES, "model_type": "llama"}, vision_config=vision, image_token_index=300,
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(model)
    (model / "chat_template.jinja").write_text(CHAT)
    words = ["sft", "--model", str(model), *FLAGS, "--output_dir"]
    assert main([*words, str(out), "--dataset", str(rows), "--train_type", "lora"]) == 0
    merge = ["export", "--model", str(model), "--adapters", str(out / "checkpoint-2"), "--merge_lora", "true"]
    assert main([*merge, "--output_dir", str(merged)]) == 0
    before, after = tensors(model), tensors(merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.search(r"(?<!vision_model)\.layers\.\d+\..*_proj\.weight", name)
                       and "visi" not in name}  # fmt: skip
    assert main(["infer", "--model", str(merged), "--prompt", "Who are you?", "--max_new_tokens", "2"]) == 0
    images = tmp_path / "images.jsonl"
    images.write_text(json.dumps({"messages": [{"role": "user", "content": "<image>Q"},
                                               {"role": "assistant", "content": "A"}], "images": ["a.png"]}))  # fmt: skip
    assert main([*words, str(tmp_path / "no"), "--dataset", str(images)]) != 0
    assert "has images" in capsys.readouterr().err


def test_a_wrapper_of_another_text_model_has_no_family() -> None:
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    assert has_family(architecture_of({**config, "text_config": {"model_type": "mistral"}}))
    assert not has_family(architecture_of({**config, "text_config": {"model_type": "other"}}))
