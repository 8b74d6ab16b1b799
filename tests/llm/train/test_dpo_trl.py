"""`dpo` trains as trl's DPOTrainer does: the same pairs in the same order, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.preprocess import preprocess
from swiftlite.llm.template import get_template
from swiftlite.llm.train.dpo import dpo_main
from swiftlite.train.plot import read_run
from swiftlite.train.schedule import build_optimizer
from tests.rows import preference_rows

ROWS = preference_rows(12)
STEPS, BATCH, BETA, RATE = 20, 4, 0.1, 5e-5
METRICS = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies")  # fmt: skip


def trl_run(directory: Path, reference: Path | None, output: Path, **config: Any) -> list[dict[str, float]]:
    """trl's log lines of training on ROWS, tokenised by our template, in the file's order."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    pairs = PairDataset([preprocess(row) for row in ROWS], get_template("qwen3", tokenizer, loss_scale="last_round"))
    rows = []
    for i in range(pairs.pairs):
        pair = pairs.pair(i)
        prompt = next(t for t, label in enumerate(pair["chosen"]["labels"]) if label != -100)
        answers = {}
        for side in ("chosen", "rejected"):
            labels = list(pair[side]["labels"])
            while labels[-1] == -100:  # the line's end behind the end token: nothing reads it
                labels.pop()
            assert all((label != -100) == (t >= prompt) for t, label in enumerate(labels))
            answers[f"{side}_ids"] = labels[prompt:]
        rows.append({"prompt_ids": list(pair["chosen"]["input_ids"][:prompt]), **answers})

    class Trainer(trl.DPOTrainer):  # type: ignore[misc,name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return [step % len(rows) for step in range(STEPS * BATCH)]

    model, ref = (
        None if path is None else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (directory, reference)
    )
    args = trl.DPOConfig(
        output_dir=str(output), beta=BETA, max_steps=STEPS,
        lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=False, disable_tqdm=True,
        **{"per_device_train_batch_size": BATCH, "learning_rate": RATE, **config},
    )  # fmt: skip
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "optim": "adamw_torch", "loraplus_lr_ratio": None}
    settings = SimpleNamespace(weight_decay=0.1, lr=args.learning_rate, **adam)
    optimizer = build_optimizer(model, settings)
    trainer = Trainer(
        model=model, ref_model=ref, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


# Our flags, trl's. With a larger rate a hinge loss is soon 0, and a robust one passes through it. trl's `sigmoid` does not
# smooth; its `aot` does, and is the same loss for one pair at a time.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {}),
    "smoothed": (
        {"label_smoothing": 0.1},
        {"loss_type": ["aot"], "label_smoothing": 0.1, "per_device_train_batch_size": 1,
         "gradient_accumulation_steps": BATCH},
    ),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss_type": "hinge", "lr": 5e-6}, {"loss_type": ["hinge"], "learning_rate": 5e-6}),
    "robust": (
        {"loss_type": "robust", "label_smoothing": 0.1, "lr": 2e-5},
        {"loss_type": ["robust"], "label_smoothing": 0.1, "learning_rate": 2e-5},
    ),
    "apo_zero": ({"loss_type": "apo_zero"}, {"loss_type": ["apo_zero"]}),
    "rpo": ({"rpo_alpha": 0.7}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}),
}  # fmt: skip
CASES = [*(("qwen3", kind, "start") for kind in KINDS), ("qwen3", "sigmoid", "other"), ("qwen3_moe", "rpo", "other")]


@pytest.mark.parametrize("family, kind, reference", CASES)
def test_equal_to_trl(family: str, kind: str, reference: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """fp32, 20 steps: loss and gradient norm within 1e-5 relative, and the loss falls."""
    ours, theirs = KINDS[kind]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ref_model = tiny_model(family, seed=1) if reference == "other" else None
    flags = {
        "model": tiny_model(family), "model_type": family, "template": "qwen3", "dataset": data, "beta": BETA,
        "output_dir": tmp_path / "ours", "torch_dtype": "float32", "global_batch_size": BATCH, "lr": RATE,
        "micro_batch_size": BATCH, "lr_decay_style": "constant", "adam_eps": 1e-5, "train_iters": STEPS,
        "dataset_shuffle": "false", "logging_steps": 1, "report_to": "none", "save_weights_only": "true", **ours,
    }  # fmt: skip
    if ref_model is not None:
        flags["ref_model"] = ref_model
    dpo_main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    mine = read_run(tmp_path / "ours/logging.jsonl")
    wanted = trl_run(tiny_model(family), ref_model, tmp_path / "trl", **theirs)
    assert len(mine) == len(wanted) == STEPS
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in wanted], rel=1e-5), name
    for name in METRICS:
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in wanted], rel=1e-5, abs=1e-5), name
    assert mine[-1]["loss"] < 0.9 * mine[0]["loss"]
