"""`--dry_run true` as a user sees it: a 218 GB model planned from its config.json and index, nothing written."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from swiftlite.checkpoint.bind import bind_map
from swiftlite.cli.main import main
from swiftlite.plan import report as dry_run
from swiftlite.utils.io import probe_disk
from tests.conftest import GOLDEN


@pytest.fixture
def air(tmp_path: Path) -> Path:
    """config.json of GLM-4.5-Air and an index as the hub has it: 47 files, with the copies of MTP's embedding and head."""
    directory = tmp_path / "GLM-4.5-Air"
    directory.mkdir()
    (directory / "config.json").write_text((GOLDEN / "glm4_5_air/config.json").read_text())
    bound = bind_map(json.loads((directory / "config.json").read_text()), with_mtp=True)
    names = [*bound.by_hf, *(d.name for d in bound.duplicates if d.name != "lm_head.weight")]
    weight_map = {name: f"model-{1 + i * 47 // len(names):05d}-of-00047.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 220_937_663_488}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "probe_disk", partial(probe_disk, seconds=0.1))


def rows(text: str) -> dict[str, str]:
    return {line[:12].strip(): line[12:] for line in text.splitlines() if re.match(r"[a-z]+ +", line)}


def test_export_of_a_model_whose_weights_are_elsewhere(
    air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mcore"
    words = ["export", "--model", str(air), "--to_mcore", "true", "--output_dir", str(out)]
    assert main([*words, "--dry_run", "true", "--gpus", "32"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["reads"] == "220.9 GB"
    assert found["writes"].startswith("218.5 GB in 22 files, the largest 9.9 GB")
    assert "too little" in found["disk"] and "measured for 2 s" in found["disk"]
    assert found["time"].startswith("about ")
    assert "NPROC_PER_NODE=8 swiftlite megatron sft --mcore_model" in found["command"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["GLM-4.5-Air"]


def test_the_command_that_export_prints_is_the_one_typed(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "--model", str(tiny_model("glm4_moe")), "--to_mcore", "true", "--thread_count", "3"]
    words += ["--output_dir", str(tmp_path / "out"), "--verify", "bitwise"]
    assert main([*words, "--dry_run", "true"]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("command     swiftlite export")
    )
    command = shlex.split(line)[2:]
    assert sorted(command) == sorted(words)
    assert main(command) == 0
    assert len(list((tmp_path / "out/iter_0000001").glob("*.distcp"))) == 3
    back = ["export", "--mcore_model", str(tmp_path / "out"), "--to_hf", "true", "--output_dir", str(tmp_path / "back")]
    assert main([*back, "--dry_run", "true"]) == 0
    whole = rows(capsys.readouterr().out)
    assert "in 1 files" in whole["writes"]
    for part in (tmp_path / "out/iter_0000001").glob("*.distcp"):
        part.unlink()  # a plan does without the weights, a conversion does not
    assert main([*back, "--dry_run", "true"]) == 0
    assert rows(capsys.readouterr().out)["writes"] == whole["writes"]
    assert main(back) == 1 and not (tmp_path / "back").exists()
    assert "__0_0.distcp is missing" in capsys.readouterr().err


def test_plan_of_frozen_parameters_and_of_an_interleaved_pipeline(
    air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["megatron", "sft", "--model", str(air), "--output_dir", str(tmp_path / "run"), "--max_length", "1024",
             "--dry_run", "true", "--gpus", "8", "--gpu_memory", "512GB", "--expert_model_parallel_size", "4",
             "--pipeline_model_parallel_size", "2", "--global_batch_size", "64"]  # fmt: skip

    def plan(*more: str) -> tuple[str, list[float]]:
        assert main([*words, *more]) == 0
        text = capsys.readouterr().out
        (line,) = [line for line in text.splitlines() if line.endswith("<- your flags")]
        return rows(text)["model"], [float(number) for number in line.split()[7:12]]

    _, whole = plan()
    said, frozen = plan("--train_type", "freeze", "--trainable_parameters", "model.layers.45.")
    assert re.fullmatch(r"106,852,245,504 parameters, 2,\d{3},\d{3},\d{3} trained", said)
    assert frozen[0] == whole[0] and frozen[1] < whole[1] / 10 and frozen[2] < whole[2] / 10
    _, interleaved = plan("--num_virtual_stages_per_pipeline_rank", "23")
    # The last stage, which has the logits too, holds (22 x 2 + 1) / 23 micro batches instead of one.
    assert interleaved[:3] == pytest.approx(whole[:3], rel=0.02) and interleaved[3] > 1.3 * whole[3]


def test_an_index_that_does_not_fit_the_config_is_refused(air: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = air / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    assert main(["export", "--model", str(air), "--to_mcore", "true", "--dry_run", "true"]) == 1
    assert "missing tensor: model.norm.weight; 1 unknown tensor: model.extra" in capsys.readouterr().err


def test_training_plan(air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["megatron", "sft", "--model", str(air), "--output_dir", str(tmp_path / "run"), "--max_length", "4096"]
    fits = ["--pipeline_model_parallel_size", "4", "--decoder_last_pipeline_num_layers", "10"]
    fits += ["--expert_model_parallel_size", "8", "--recompute", "full"]
    assert main([*words, *fits, "--dry_run", "true", "--gpus", "32"]) == 0
    text = capsys.readouterr().out
    assert (
        rows(text)["model"] == "106,852,245,504 parameters, 106,852,245,504 trained"
        and rows(text)["reads"] == "220.9 GB"
    )
    assert re.search(r"  1   4   1   8   1   8 full .*<- your flags", text)
    assert "swiftlite megatron sft" in rows(text)["command"] and "--dry_run" not in rows(text)["command"]

    assert main([*words, "--dry_run", "true", "--gpus", "8"]) == 0
    assert "no layout fits" in capsys.readouterr().out
    assert main([*words, "--dry_run", "true", "--gpus", "8", "--gpu_memory", "512GB"]) == 0
    text = capsys.readouterr().out
    assert "your flags need" in text and "--expert_model_parallel_size" in rows(text)["command"]
    assert not (tmp_path / "run").exists()


def test_a_plan_finds_the_data(air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["megatron", "sft", "--model", str(air), "--output_dir", str(tmp_path / "run"), "--dry_run", "true"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "info.json").write_text('{"mine": {"path": "none.jsonl"}}')
    for data, reason in (
        (["--dataset", str(tmp_path / "none.jsonl")], "no such file"),
        (["--dataset", str(tmp_path / "empty")], "holds no data files"),
        (["--dataset", "mine", "--dataset_info", str(tmp_path / "info.json")], "none.jsonl, which does not exist"),
        (["--cached_dataset", str(tmp_path / "empty")], "cached_dataset"),
    ):
        assert main([*words, *data]) != 0
        assert reason in capsys.readouterr().err, data


def test_preference_plan(air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair is two sequences, and the reference stays next to the model unless it has answered before."""
    words = ["--model", str(air), "--output_dir", str(tmp_path / "run"), "--max_length", "4096", "--recompute", "full"]
    words += ["--expert_model_parallel_size", "8", "--dry_run", "true", "--gpus", "16", "--gpu_memory", "512GB"]
    needs, texts = [], []
    for command, flags in (
        ("sft", []), ("dpo", []), ("dpo", ["--precompute_ref_log_probs", "true"]), ("dpo", ["--packing", "true"]),
    ):  # fmt: skip
        assert main(["megatron", command, *words, *flags]) == 0
        texts.append(capsys.readouterr().out)
        (line,) = [line for line in texts[-1].splitlines() if line.endswith("<- your flags")]
        weights, _, _, activations, _ = (float(number) for number in line.split()[7:12])
        needs.append((weights, activations))
    (weights, activations), live, known, packed = needs
    of_output = 151552 * 4096 * 2 / 1e9  # the output layer's gradient, which is not longer for more tokens
    assert live[0] == pytest.approx(2 * weights, abs=0.1)
    assert live[1] == pytest.approx(2 * activations - of_output, abs=0.2)
    assert known == (weights, live[1]) and packed == (live[0], activations)
    assert "swiftlite megatron dpo" in rows(texts[1])["command"] and "2 x 4096 tokens" in texts[1]


def test_models_beside_the_trained_one(
    air: Path, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher's weights and its logits of a step, in the size that it has; a reference of LoRA that has adapters."""
    student = str(tiny_model("qwen3", vocab_size=151552, num_hidden_layers=4))
    words = ["--model", student, "--model_type", "qwen3", "--max_length", "4096", "--output_dir", str(tmp_path / "run")]
    words += ["--dry_run", "true", "--gpus", "2", "--torch_dtype", "bfloat16", "--pipeline_model_parallel_size", "2"]
    words += ["--global_batch_size", "4", "--gpu_memory", "900GB"]

    def plan(*flags: str) -> tuple[float, float, str]:
        assert main(["megatron", "rlhf", *words, *flags]) == 0
        text = capsys.readouterr().out
        (line,) = [line for line in text.splitlines() if line.endswith("<- your flags")]
        weights, _, _, activations, _ = (float(number) for number in line.split()[7:12])
        return weights, activations, text

    (tmp_path / "said").mkdir()
    (tmp_path / "said/teacher_logits.json").write_text("{}")
    gkd = ["--rlhf_type", "gkd"]
    live, logits, told = plan(*gkd, "--teacher_model", str(air))
    known, few, silent = plan(*gkd, "--teacher_logits", str(tmp_path / "said"))
    small, reverse, _ = plan(*gkd, "--teacher_model", student, "--beta", "1")
    assert "parameters beside the model" in rows(told)["teacher"] and "--teacher_logits" in rows(told)["teacher"]
    assert "teacher" not in rows(silent) and live > known + 105, "its weights, on two stages"
    tokens, vocabulary, passes = 4096, 151552, 4
    assert known <= small < known + 0.1
    chunk = 2**25  # logits whose divergence is made at a time
    assert logits - few == pytest.approx((tokens * vocabulary * 2 * passes + chunk * (52 - 25)) / 1e9, abs=0.2)
    assert logits - reverse == pytest.approx(chunk * (52 - 28) / 1e9, abs=0.2)
    own, kto = plan("--rlhf_type", "dpo"), plan("--rlhf_type", "kto")
    other = plan("--rlhf_type", "kto", "--ref_model", str(air))
    assert kto[0] == own[0] and other[0] > own[0] + 105 and "reference" in rows(own[2])
    lora = ["--train_type", "lora", "--rlhf_type", "kto"]
    assert "reference" not in rows(plan(*lora)[2])
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).write_text("{}")
    assert "reference" in rows(plan(*lora, "--ref_adapters", str(tmp_path / "adapter"))[2])


def test_a_dry_run_starts_no_processes(air: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    monkeypatch.setattr("swiftlite.cli.launcher.launch", lambda *args: pytest.fail("torchrun was started"))
    assert main(["export", "--model", str(air), "--to_mcore", "true", "--dry_run", "true"]) == 0


def test_plan_flags_without_a_dry_run_are_refused(air: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(air), "--to_mcore", "true", "--gpus", "8"]) == 2
    assert "--gpus 8: belongs to the plan; add --dry_run true" in capsys.readouterr().err


def test_disk_probe_leaves_nothing(tmp_path: Path) -> None:
    speed = probe_disk(tmp_path / "not/yet/there", seconds=0.2)
    assert speed is not None and speed.read > 1e6 and speed.write > 1e6
    assert list(tmp_path.iterdir()) == []


def test_plan_of_adapters(air: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight GPUs are too few for all parameters and enough for adapters."""

    def plan(*words: str) -> str:
        flags = [
            "--model",
            str(air),
            "--output_dir",
            str(tmp_path / "run"),
            "--max_length",
            "1024",
            "--dry_run",
            "true",
        ]
        flags += ["--tensor_model_parallel_size", "8", "--expert_model_parallel_size", "8", "--gpus", "8"]
        assert main(["megatron", "sft", *flags, "--expert_tensor_parallel_size", "1", *words]) == 0
        return capsys.readouterr().out

    assert "your flags need" in plan()
    lora = plan("--train_type", "lora", "--lora_rank", "8", "--target_modules", "q_proj", "v_proj")
    trained = 46 * 8 * ((4096 + 96 * 128) + (4096 + 8 * 128))
    assert f"106,852,245,504 parameters, {trained:,} trained" in rows(lora)["model"]
    assert "--train_type lora" in rows(lora)["command"] and "your flags need" not in lora
