"""`rlhf --rlhf_type kto` trains as trl's KTOTrainer does: the same answers in the same order, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.llm.train.kto import kto_main
from swiftlite.train.plot import read_run
from swiftlite.train.schedule import build_optimizer
from tests.rows import answer_rows

ROWS = answer_rows(12)
STEPS, BATCH, RATE = 20, 4, 3e-5
METRICS = ("kl", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")


def trl_run(directory: Path, reference: Path, output: Path, rows: list[Any], **config: Any) -> list[dict[str, float]]:
    """trl's log lines of training on ROWS as our template tokenises them, in the file's order."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(trl.KTOTrainer):  # type: ignore[misc,name-defined]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            def mismatch(examples: Any) -> Any:  # as trl's own _prepare_dataset does it
                answers = examples["completion_ids"]
                return {**examples, "KL_completion_ids": [answers[-1], *answers[:-1]]}

            return dataset.map(mismatch, batched=True, batch_size=BATCH)

        def _get_train_sampler(self, *_: Any) -> Any:  # before transformers 5.2 in any order, unless KL is asked for
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, ref = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (directory, reference))
    args = trl.KTOConfig(
        output_dir=str(output), max_steps=STEPS, lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=False,
        disable_tqdm=True, per_device_train_batch_size=BATCH, learning_rate=RATE, **config,
    )  # fmt: skip
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "optim": "adamw_torch", "loraplus_lr_ratio": None}
    optimizer = build_optimizer(model, SimpleNamespace(weight_decay=0.1, lr=RATE, **adam))
    trainer = Trainer(
        model=model, ref_model=ref, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


KINDS: dict[str, dict[str, Any]] = {
    "kto": {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.2},
    "apo_zero_unpaired": {"beta": 0.1, "loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_trl(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, 20 steps: loss and gradient norm within 1e-5 relative, and the loss falls."""
    from swiftlite.llm.dataset.answers import answers_of
    from swiftlite.llm.train import kto

    seen: list[Any] = []
    load = kto.load_answers
    monkeypatch.setattr(kto, "load_answers", lambda *args: seen.append(load(*args)) or seen[-1])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    models = [tiny_model("qwen3", seed=seed) for seed in (0, 1)]
    flags = {
        "model": models[0], "ref_model": models[1], "model_type": "qwen3", "template": "qwen3", "dataset": data,
        "output_dir": tmp_path / "ours", "torch_dtype": "float32", "global_batch_size": BATCH, "lr": RATE,
        "micro_batch_size": 1, "lr_decay_style": "constant", "adam_eps": 1e-5, "train_iters": STEPS, "rlhf_type": "kto",
        "dataset_shuffle": "false", "logging_steps": 1, "report_to": "none", "save_weights_only": "true", **KINDS[kind],
    }  # fmt: skip
    kto_main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    mine = read_run(tmp_path / "ours/logging.jsonl")
    rows = []
    for item in answers_of(list(seen[0][0])):
        labels = list(item["labels"])
        while labels[-1] == -100:  # the line's end behind the end token: nothing reads it
            labels.pop()
        start = next(t for t, label in enumerate(labels) if label != -100)
        rows.append({"prompt_ids": item["input_ids"][:start], "completion_ids": labels[start:],
                     "label": item["desirable"]})  # fmt: skip
    wanted = trl_run(*models, tmp_path / "trl", rows, **KINDS[kind])
    assert len(mine) == len(wanted) == STEPS
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in wanted], rel=1e-5), name
    for name in METRICS if kind == "kto" else METRICS[1:]:
        # Scores are differences of sums of about 100, which fp32 tells from each other by 1e-5.
        rounding = 5e-7 * max(abs(line["logps/chosen"]) for line in wanted)
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in wanted], 1e-5, rounding), name
    assert mine[-1]["loss"] < 0.95 * mine[0]["loss"]
    if kind == "kto":
        assert any(line["kl"] for line in mine)
