"""Every objective on a GPU in bf16 with Transformer Engine: the steps are near transformers', and what it says is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.cli.main import main
from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.train.plot import read_run
from tests.gpu.test_te import bf16_model, config
from tests.rows import GROUPS, LABELLED, answer_rows, preference_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LORA = ["--train_type", "lora", "--lora_rank", "8", "--lora_dropout", "0"]
GENERATIVE = ["--generative_reranker_positive_token", "y", "--generative_reranker_negative_token", "n"]
# family, command, flags, data
CASES: dict[str, tuple[str, str, list[str], list[dict[str, Any]]]] = {
    "dpo": ("qwen3", "rlhf", ["--rlhf_type", "dpo"], preference_rows(8)),
    "simpo": ("qwen3", "rlhf", ["--rlhf_type", "simpo"], preference_rows(8)),
    "kto": ("qwen3", "rlhf", ["--rlhf_type", "kto"], answer_rows(8)),
    "kto packed": ("qwen3", "rlhf", ["--rlhf_type", "kto", "--packing", "true"], answer_rows(8)),
    "reward model": ("qwen3", "rlhf", ["--rlhf_type", "rm"], preference_rows(8)),
    "gkd": ("qwen3", "rlhf", ["--rlhf_type", "gkd", "--beta", "0.5"], preference_rows(8)),
    "gkd known": ("qwen3", "rlhf", ["--rlhf_type", "gkd", "--beta", "0.5"], preference_rows(8)),
    "classes": ("qwen3", "sft", ["--task_type", "seq_cls", "--num_labels", "3"], LABELLED[:8]),
    "classes moe": ("qwen3_moe", "sft", ["--task_type", "seq_cls", "--num_labels", "3", "--lr", "1e-4"], LABELLED[:8]),
    "embedding": ("qwen3", "sft", ["--task_type", "embedding"], GROUPS[:8]),
    "reranker": ("qwen3", "sft", ["--task_type", "reranker"], GROUPS[:8]),
    "generative reranker": ("qwen3", "sft", ["--task_type", "generative_reranker", *GENERATIVE], GROUPS[:8]),
    "whole modules": ("qwen3", "sft", [*LORA, "--modules_to_save", "embed_tokens", "lm_head"], preference_rows(8)),
}


class Side:
    """Runs of one case in a directory of its own."""

    def __init__(self, case: str, root: Path, tokenizer: Path) -> None:
        self.root, self.tokenizer = root, tokenizer
        self.family, self.command, flags, rows = CASES[case]
        self.data = root / "data.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.model = self._model("model", 0)
        self.common = [
            "--template",
            "chatml",
            "--val_dataset",
            str(self.data),
            "--max_length",
            "400",
            "--report_to",
            "none",
        ]
        if case == "gkd known":
            known = ["--to_teacher_logits", "true", "--teacher_topk", "400", "--output_dir", str(root / "known")]
            words = [*self._named(), *self._teacher(), "--dataset", str(self.data), *known]
            assert main(["export", *words, *self.common[:-2]]) == 0
            flags = [*flags, "--teacher_logits", str(root / "known")]
        elif case == "gkd":
            flags = [*flags, *self._teacher()]
        self.flags = [*self.common, "--global_batch_size", "8", "--micro_batch_size", "8", *flags]

    def _named(self) -> list[str]:
        return ["--model", str(self.model), "--model_type", self.family]

    def _teacher(self) -> list[str]:
        return ["--teacher_model", str(self._model("teacher", 1))]

    def _model(self, name: str, seed: int) -> Path:
        directory = self.root / name
        if not directory.exists():
            bf16_model(config(f"{self.family}:default"), directory, self.tokenizer, seed)
        return directory

    def train(self, side: str) -> list[dict[str, float]]:
        """Log lines of 8 steps on the same rows, evaluated after the fourth and the last."""
        words = [*self._named(), "--lr", "1e-3", *self.flags, "--dataset", str(self.data), "--train_iters", "8"]
        words += ["--logging_steps", "1", "--eval_steps", "4", "--output_dir", str(self.root / side)]
        assert main([*(["megatron"] if side == "mcore" else []), self.command, *words]) == 0
        return read_run(self.root / side / "logging.jsonl")

    def evaluate(self) -> float:
        """What `--skip_train true` says of the Megatron run's last checkpoint."""
        alone = {"sft": megatron_sft_main, "rlhf": megatron_rlhf_main}[self.command]
        kind = "mcore_adapter" if "lora" in self.flags else "mcore_model"
        words = [f"--{kind}", str(self.root / "mcore"), *self.flags, "--skip_train", "true"]
        if kind == "mcore_adapter":
            words += self._named()
        elif {"dpo", "kto"} & set(self.flags):
            words += ["--ref_model", str(self.model)]
        return float(alone(words)["eval_loss"])


@pytest.mark.parametrize("case", CASES)
def test_both_sides(case: str, tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """Losses near transformers', falling; an evaluation alone says what the run's last one did; the way back is exact."""
    side = Side(case, tmp_path, tiny_tokenizer_dir)
    mine, theirs = side.train("mcore"), side.train("hf")
    curves = [[line["loss"] for line in lines if "loss" in line] for lines in (mine, theirs)]
    after = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in (mine, theirs)]
    print(case, curves, after)
    assert len(curves[0]) == 8 and curves[0][0] == pytest.approx(curves[1][0], rel=0.02)
    assert curves[0] == pytest.approx(curves[1], rel=0.1, abs=0.02) and curves[0][-1] < 0.9 * curves[0][0]
    assert after[0] == pytest.approx(after[1], rel=0.1, abs=0.02)
    files = sorted(tmp_path.rglob("*"))
    assert side.evaluate() == pytest.approx(after[0][-1], rel=0.01, abs=0.002)
    assert sorted(tmp_path.rglob("*")) == files
    kind = "--mcore_adapter" if "lora" in side.flags else "--mcore_model"
    back = ["--to_hf", "true", "--output_dir", str(tmp_path / "back"), "--verify", "bitwise"]
    assert main(["export", kind, str(tmp_path / "mcore"), *back]) == 0
