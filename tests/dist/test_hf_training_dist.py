"""`swiftlite sft` and `dpo` on two data-parallel processes compute what one computes; a signal to one rank ends both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.llm.train.rlhf import rlhf_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from tests.dist.launch import run_cases
from tests.rows import preference_rows

pytestmark = pytest.mark.dist

# 15 rows, of which 3 are for evaluation: two on one rank, one on the other.
ROWS = [{**row, "channel": "ab"[i % 2]} for i, row in enumerate(preference_rows(15))]
LABELLED = [{**row, "label": number % 2} for number, row in enumerate(ROWS)]
# Losses that look at the micro batches of all ranks: a row of each here, both rows in one process.
TOGETHER = {
    "vectors": ["--task_type", "embedding", "--infonce_include_qq", "true", "--infonce_include_dd", "true"],
    "vectors-online": ["--task_type", "embedding", "--loss_type", "online_contrastive"],
}
LORA = ["--train_type", "lora", "--lora_dropout", "0", "--lr", "1e-2"]
# Name -> command, model, flags, fault.
CASES: dict[str, tuple[str, str, list[str], str | None]] = {
    "full": ("sft", "qwen3", ["--enable_channel_loss", "true"], None),
    "experts-lora": ("sft", "glm4_moe", LORA, None),
    "experts-recomputed": ("sft", "glm4_moe", ["--recompute", "full"], None),
    "dpo": ("dpo", "qwen3", ["--rpo_alpha", "0.3", "--precompute_ref_log_probs", "true"], None),
    "dpo-lora": ("dpo", "glm4_moe", [*LORA, "--lr", "3e-3"], None),  # at a higher rate rounding grows
    "kto": ("dpo", "qwen3", ["--rlhf_type", "kto"], None),
    "gkd": ("dpo", "qwen3", ["--rlhf_type", "gkd", "--teacher_model", "other"], None),
    **{name: ("sft", "qwen3", flags, None) for name, flags in TOGETHER.items()},
    "stopped": ("sft", "qwen3", [], "sigterm"),
    "unreduced": ("sft", "qwen3", [], "unreduced"),
}
COMPARED = ("step", "loss", "lr", "grad_norm", "eval_loss", "rewards/margins", "eval_rewards/margins", "loss_a", "loss_b",
            "eval_loss_a", "eval_loss_b", "kl", "eval_kl")  # fmt: skip


def compared(line: dict[str, Any]) -> dict[str, float]:
    return {name: line[name] for name in COMPARED if name in line}


def test_two_processes_equal_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data, labelled = tmp_path / "data.jsonl", tmp_path / "labelled.jsonl"
    for path, rows in ((data, ROWS), (labelled, LABELLED)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    types = {"qwen3": "qwen3", "glm4_moe": "glm4_5"}

    def words(case: str, output: Path, ranks: int = 1) -> list[str]:
        _, family, given, _ = CASES[case]
        micro, file = (2 // ranks if case in TOGETHER else 1), (labelled if case == "vectors-online" else data)
        flags = [str(tiny_model(family, seed=1)) if word == "other" else word for word in given]
        return ["--model", str(tiny_model(family)), "--model_type", types[family], "--template", "qwen3", "--dataset",
                str(file), "--split_dataset_ratio", "0.2", "--train_iters", "6", "--global_batch_size", "4",
                "--micro_batch_size", str(micro), "--max_length", "200", "--torch_dtype", "float32", "--lr", "1e-3",
                "--logging_steps", "1", "--eval_steps", "3", "--report_to", "none", "--output_dir", str(output),
                *flags]  # fmt: skip

    one, two = tmp_path / "one", tmp_path / "two"
    cases = [(command, words(name, two / name, 2), fault) for name, (command, _, _, fault) in CASES.items()]
    code, errors = run_cases(2, cases, "tests.dist.worker_hf")
    assert code == 0, errors[-3000:]
    for case, (command, _, _, fault) in CASES.items():
        if fault is not None:
            continue
        {"sft": sft_main, "dpo": rlhf_main}[command](words(case, one / case))
        alone, shared = (read_run(root / case / "logging.jsonl") for root in (one, two))
        assert [line["step"] for line in alone] == [1, 2, 3, 3, 4, 5, 6, 6]
        assert len(shared) == 8
        for first, second in zip(alone, shared, strict=True):
            assert compared(second) == pytest.approx(compared(first), rel=1e-5, abs=1e-6), case
    full = [compared(line) for line in read_run(one / "full/logging.jsonl")]
    named = {name for line in full for name in line}
    assert {"loss_a", "loss_b"} <= named and named & {"eval_loss_a", "eval_loss_b"}
    full = [{name: value for name, value in line.items() if name[-2:] not in ("_a", "_b")} for line in full]
    control = [compared(line) for line in read_run(two / "unreduced/logging.jsonl")]
    assert control[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-5), "the same start"
    assert abs(control[-1]["eval_loss"] / full[-1]["eval_loss"] - 1) > 1e-3, "the comparison sees a missing reduction"
    stopped = two / "stopped"
    assert [p.name for p in stopped.glob("checkpoint-*")] == ["checkpoint-3"], "both ranks end after the same step"
    assert {p.name for p in (stopped / "checkpoint-3").glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    # It resumes with one process: more ranks or fewer compute the same.
    sft_main(words("stopped", stopped))
    resumed = [compared(line) for line in read_run(stopped / "logging.jsonl")]
    for first, second in zip(full, resumed, strict=True):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-6)
