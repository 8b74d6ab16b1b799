"""`swiftlite check --parity true`: both trainers agree step by step, and a damaged one is caught at the step it shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.cli.main import main
from swiftlite.llm.train import optimization
from swiftlite.megatron.trainers import base
from swiftlite.selftest.parity import TOLERANCE, compare
from swiftlite.utils.errors import VerifyError

QUESTIONS = ["Who are you?", "What is your name?", "Say hello.", "What can you do?", "Are you a robot?"]
TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "qwen3_next": "qwen3_next"}
# Rounding grows in random layers of linear attention upon each other.
TAKING_TURNS = {"qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2}}


@pytest.fixture
def check(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, list[str], str]]:
    """check(family, flag, ...) -> (exit code, lines of stdout, stderr)."""
    data = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{q} {i}"},
                      {"role": "assistant", "content": "I am Swifty. " * (i % 3 + 1)}],
         "rejected_response": "No idea" + " at all" * (i % 4)}
        for i in range(4) for q in QUESTIONS
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(family: str, *flags: str) -> tuple[int, list[str], str]:
        words = [
            "--model",
            str(tiny_model(family, **TAKING_TURNS.get(family, {}))),
            "--model_type",
            TYPES[family],
            "--dataset",
            str(data),
        ]
        code = main(["check", "--parity", "true", *words, *flags])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


@pytest.mark.parametrize("train_type", ["full", "lora"])
@pytest.mark.parametrize("family", ["qwen3", "glm4_moe", "qwen3_next"])
def test_both_sides_agree(family: str, train_type: str, check: Any) -> None:
    code, table, told = check(family, "--train_type", train_type)
    assert code == 0, told
    assert [line.split()[0] for line in table] == ["step", *map(str, range(1, 21))]
    assert "20 steps, loss within" in told and "hardly fell" not in told


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_both_sides_agree_on_preferences(train_type: str, check: Any) -> None:
    code, table, told = check("glm4_moe", "--rlhf_type", "dpo", "--train_type", train_type)
    assert code == 0, told
    assert len(table) == 21 and "logps/rejected within" in told and "hardly fell" not in told


def test_shrunken_models_and_too_little_learning(check: Any) -> None:
    code, table, told = check("glm4_moe", "--shrink", "true", "--train_iters", "3", "--lr", "1e-6")
    assert code == 0 and len(table) == 4, told
    assert "the loss hardly fell" in told


def test_a_doubled_gradient_is_caught_at_once(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = base.finalize_model_grads

    def double(models: Any, *args: Any, **kwargs: Any) -> None:
        original(models, *args, **kwargs)
        for model in models:
            for name, parameter in model.named_parameters():
                if "layers.1.mlp.linear_fc2" in name:
                    parameter.main_grad.mul_(2)

    monkeypatch.setattr(base, "finalize_model_grads", double)
    code, table, told = check("qwen3", "--train_iters", "2")
    assert code == 1 and len(table) == 3
    assert "step 1: grad_norm" in told and table[1].endswith("!")


def test_another_learning_rate_is_caught_after_the_first_step(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = optimization.lr_schedule
    monkeypatch.setattr(optimization, "lr_schedule", lambda *a: lambda step: 1.01 * original(*a)(step))
    code, _, told = check("qwen3", "--train_iters", "3")
    assert code == 1 and "step 2: loss" in told


def test_the_first_value_beyond_the_tolerance_is_named() -> None:
    lines = [{"step": step, "loss": 4.0 - step, "grad_norm": 2.0} for step in (1, 2, 3)]
    near = [{**line, "loss": line["loss"] * (1 + 0.9 * TOLERANCE)} for line in lines]
    table, result, wrong = compare(lines, near)
    assert wrong is None and "!" not in table
    assert result.steps == 3 and result.fall == pytest.approx(2 / 3)
    assert result.largest == pytest.approx({"loss": 0.9 * TOLERANCE, "grad_norm": 0})
    far = [lines[0], *({**line, "grad_norm": 2.1} for line in lines[1:])]
    table, result, wrong = compare(lines, far)
    assert wrong == "step 2: grad_norm 2 with transformers, 2.1 on Megatron, 5.0e-02 off"
    assert table.count("!") == 2
    with pytest.raises(VerifyError, match="3 steps with transformers and 2 on Megatron"):
        compare(lines, lines[:2])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--parity", "true", "--model", "DIR"], "give --model DIR_OR_ID and --dataset FILE"),
        (["--model", "DIR", "--shrink", "true"], "--shrink: goes with --parity true only"),
    ],
)
def test_wrong_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words]) == 2
    assert told in capsys.readouterr().err
