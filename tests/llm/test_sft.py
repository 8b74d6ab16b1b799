"""`swiftlite sft`: the same losses as on Megatron, resumption, LoRA that peft loads, and what bad input gets."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftlite.cli.main import main
from swiftlite.utils.errors import UsageError

QUESTIONS = ["Who are you?", "What is your name?", "Say hello.", "What can you do?", "Are you a robot?"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    answer = "I am Swifty. "
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{q} {i}"},
                {"role": "assistant", "content": answer * (i % 3 + 1)},
            ]
        }
        for i in range(4)
        for q in QUESTIONS
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    "style", ["cosine", "linear", "constant", "WSD", "WSD minus_sqrt", "WSD linear", "inverse_sqrt"]
)
@pytest.mark.parametrize("warmup", [{"lr_warmup_fraction": 0.13}, {"lr_warmup_iters": 3}, {}])
def test_learning_rates_are_megatron_cores(style: str, warmup: dict[str, float]) -> None:
    from types import SimpleNamespace

    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from swiftlite.arguments.train import SftArguments
    from swiftlite.train.schedule import lr_schedule

    if style == "inverse_sqrt" and not warmup:
        with pytest.raises(UsageError, match="falls from the end of the warm-up"):
            SftArguments(lr=2e-3, lr_decay_style=style)
        return
    style, _, end = style.partition(" ")
    flags = {"lr_wsd_decay_iters": 6} if style == "WSD" else {}
    args = SftArguments(
        lr=2e-3, min_lr=1e-4, lr_decay_style=style, lr_wsd_decay_style=end or "exponential", **flags, **warmup
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, "max_lr": 2e-3, "min_lr": 1e-4}])
    steps = math.ceil(17 * (args.lr_warmup_fraction or 0)) or args.lr_warmup_iters
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=2e-3, min_lr=1e-4, lr_warmup_steps=steps, lr_decay_steps=17,
        lr_decay_style=args.lr_decay_style, lr_wsd_decay_style=args.lr_wsd_decay_style, wsd_decay_steps=6,
        start_wd=0.0, end_wd=0.0, wd_incr_steps=17, wd_incr_style="constant",
    )  # fmt: skip
    share = lr_schedule(args, 17)
    for step in range(20):
        assert share(step) * 2e-3 == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        theirs.step(1)


@pytest.mark.parametrize(
    "share, steps, warmup", [(0.03, 30, 1), (0.29, 100, 29), (0.1, 13, 2), (1.0, 4, 4), (0.5, 1, 1)]
)
def test_a_warmup_ratio_rounds_up_as_in_transformers(share: float, steps: int, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    from swiftlite.arguments.train import SftArguments
    from swiftlite.train.schedule import lr_schedule, warmup_and_decay

    args = SftArguments(lr=1e-3, lr_decay_style="linear", warmup_ratio=share)
    assert warmup_and_decay(args, steps)[0] == warmup
    theirs = get_scheduler("linear", torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup, steps).lr_lambdas[0]
    ours = lr_schedule(args, steps)
    assert [ours(step) for step in range(steps)] == pytest.approx([theirs(step) for step in range(steps)], rel=1e-12)


FLAGS = ["--global_batch_size", "4", "--micro_batch_size", "2", "--lr", "1e-3", "--logging_steps", "1", "--seed", "7",
         "--torch_dtype", "float32", "--lr_warmup_fraction", "0.1", "--max_length", "200"]  # fmt: skip


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "logging.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_hugging_face_and_megatron_have_the_same_losses(
    family: str, tiny_model: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    """fp32, 16 steps, the same samples in the same order: within 1e-5 relative, and the loss falls by a quarter."""
    model_type = {"qwen3": "qwen3", "glm4_moe": "glm4_5"}[family]
    words = [
        "--model",
        str(tiny_model(family)),
        "--model_type",
        model_type,
        "--dataset",
        str(data),
        "--train_iters",
        "16",
    ]
    words += [*FLAGS, "--adam_eps", "1e-5"]
    assert main(["sft", *words, "--output_dir", str(tmp_path / "hf")]) == 0
    assert main(["megatron", "sft", *words, "--output_dir", str(tmp_path / "mcore")]) == 0
    theirs, mine = losses(tmp_path / "hf"), losses(tmp_path / "mcore")
    assert len(theirs) == len(mine) == 16
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert theirs[-1] < 0.75 * theirs[0]


def test_the_same_command_goes_on(tiny_model: Callable[..., Path], data: Path, tmp_path: Path, plots: None) -> None:
    words = ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data), *FLAGS]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = ["--train_iters", "8", "--save_steps", "4"]
    assert main(["sft", *words, *steps, "--output_dir", str(whole)]) == 0
    assert main(["sft", *words, *steps, "--output_dir", str(parts)]) == 0
    import shutil

    shutil.rmtree(parts / "checkpoint-8")  # as if the run had been killed after step 4
    assert main(["sft", *words, *steps, "--output_dir", str(parts)]) == 0
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    assert (parts / "loss.png").is_file() and list((parts / "runs").iterdir())


def test_lora_is_what_peft_loads(tiny_model: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    words = ["--model", str(base), "--model_type", "qwen3", "--dataset", str(data), *FLAGS, "--train_type", "lora"]
    words += ["--train_iters", "4", "--lora_dropout", "0", "--val_dataset", str(data), "--eval_steps", "2"]
    assert main(["sft", *words, "--output_dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/logging.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]
    adapter = tmp_path / "run/checkpoint-4"
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert set(targets) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    words = ["--model", str(base), "--model_type", "qwen3", "--adapters", str(adapter), "--merge_lora", "true"]
    assert main(["export", *words, "--output_dir", str(tmp_path / "merged")]) == 0


def test_another_run_in_the_directory(
    tiny_model: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data), *FLAGS]
    words += ["--train_iters", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["sft", *words]) == 0
    assert main(["sft", *words, "--weight_decay", "0.5"]) == 2
    assert "holds a run with other settings (weight_decay 0.1 -> 0.5)" in capsys.readouterr().err
    assert main(["sft", *words, "--resume", "false"]) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    words[-1] = str(tmp_path / "mine")
    assert main(["sft", *words]) == 2
