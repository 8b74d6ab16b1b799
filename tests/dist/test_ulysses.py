"""`--sequence_parallel_size 2` computes what one process computes, whatever a batch looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from swiftlite.cli.export import export_main
from swiftlite.train.plot import read_run
from tests.dist.launch import run_cases
from tests.dist.test_hf_training_dist import compared
from tests.dist.worker_hf import COMMANDS
from tests.rows import preference_rows

pytestmark = pytest.mark.dist

LORA = ["--train_type", "lora", "--lora_dropout", "0", "--lr", "1e-2"]
# Name -> command, model, what differs in its config, flags, fault.
CASES: dict[str, tuple[str, str, dict[str, object], list[str], str | None]] = {
    "rows": ("sft", "qwen3", {}, ["--loss_scale", "last_round", "--micro_batch_size", "2"], None),
    "joined": ("sft", "qwen3", {"num_key_value_heads": 1}, ["--padding_free", "true", "--micro_batch_size", "2"], None),
    "packed-sharded": ("sft", "qwen3", {}, ["--packing", "true", "--fsdp", "full_shard"], None),
    "left": ("sft", "gemma3_text", {}, ["--padding_side", "left", "--micro_batch_size", "4"], None),
    "lora": ("sft", "glm4_moe", {}, [*LORA, "--recompute", "full"], None),
    "dpo": ("dpo", "qwen3", {}, ["--rpo_alpha", "0.3", "--precompute_ref_log_probs", "true"], None),
    "dpo-lora": ("dpo", "qwen3", {}, [*LORA, "--padding_free", "true"], None),
    "dpo-live": ("dpo", "qwen3", {}, [], None),
    "taught": ("dpo", "qwen3", {}, ["--rlhf_type", "gkd", "--teacher_logits", "made", "--micro_batch_size", "2"], None),
    "places": ("sft", "qwen3", {}, [], "places"),
}
TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "gemma3_text": "gemma3_text"}


def test_two_processes_that_share_sequences_equal_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(15)))

    def words(case: str, output: Path, *more: str) -> list[str]:
        _, family, config, flags, _ = CASES[case]
        flags = [str(tmp_path / word) if word == "made" else word for word in flags]
        return ["--model", str(tiny_model(family, **config)), "--model_type", TYPES[family], "--template", "qwen3",
                "--dataset", str(data), "--split_dataset_ratio", "0.2", "--train_iters", "8", "--global_batch_size", "4",
                "--micro_batch_size", "1", "--max_length", "201", "--torch_dtype", "float32", "--lr", "1e-3",
                "--logging_steps", "1", "--eval_steps", "4", "--report_to", "none", "--output_dir", str(output),
                *flags, *more]  # fmt: skip

    student, teacher = (str(tiny_model("qwen3", seed=seed)) for seed in (0, 1))
    export_main(["--to_teacher_logits", "true", "--model", student, "--model_type", "qwen3", "--template", "qwen3",
                 "--teacher_model", teacher, "--teacher_topk", "20", "--dataset", str(data), "--max_length", "201",
                 "--torch_dtype", "float32", "--output_dir", str(tmp_path / "made")])  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    shared = ("--sequence_parallel_size", "2")
    cases = [(command, words(n, two / n, *shared), fault) for n, (command, *_, fault) in CASES.items()]
    code, errors = run_cases(2, cases, "tests.dist.worker_hf")
    assert code == 0, errors[-5000:]
    for case, (command, *_, fault) in CASES.items():
        COMMANDS[command](words(case, one / case, "--fsdp", "none"))
        alone, together = (read_run(root / case / "logging.jsonl") for root in (one, two))
        assert [line["step"] for line in alone] == [line["step"] for line in together] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
        same = [
            compared(second) == pytest.approx(compared(first), rel=1e-5, abs=1e-6)
            for first, second in zip(alone, together, strict=True)
        ]
        assert all(same) if fault is None else not same[0], (case, same)
