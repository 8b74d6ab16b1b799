"""Losses of heads against transformers' and trl's own, with gradients; sums of parts add up to those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.task import PROBLEMS
from swiftlite.train.classification import ClassificationLoss
from swiftlite.train.reward_loss import RewardLoss

CASES = [(problem, count) for problem in PROBLEMS for count in (1, 2, 5) if count > 1 or problem == "regression"]


def example(problem: str, count: int, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(size, count, generator=generator) * 2
    if problem == "single_label_classification":
        return logits, torch.randint(0, count, (size,), generator=generator)
    if problem == "multi_label_classification":
        return logits, torch.randint(0, 2, (size, count), generator=generator).float()
    return logits, torch.randn(size, count, generator=generator)


@pytest.mark.parametrize("problem, count", CASES)
def test_classification_is_transformers(problem: str, count: int) -> None:
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    logits, labels = example(problem, count)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    config: Any = SimpleNamespace(num_labels=count, problem_type=problem)
    expected = ForSequenceClassificationLoss(labels, theirs, config)
    loss = ClassificationLoss(problem, count)
    sums = loss.sums(ours, labels, by_class=True)
    total = loss.total(sums)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-7)
    expected.backward()
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    # Unequal parts of a global batch: each divides by the count of the whole.
    whole = torch.tensor(float(len(labels)))
    parts = [loss.sums(logits[at], labels[at], by_class=True) for at in (slice(5), slice(5, None))]
    torch.testing.assert_close(sum(loss.total({**part, "labels": whole}) for part in parts), expected.detach())
    added = {name: float(sum(part[name] for part in parts)) for name in sums}
    told = loss.metrics({name: value.item() for name, value in sums.items()})
    assert loss.metrics(added) == pytest.approx(told)
    assert told == pytest.approx({"loss": float(expected), **by_hand(problem, count, logits, labels)})


def by_hand(problem: str, count: int, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and F1 as sets of (sample, class), counted one by one."""
    if problem == "regression":
        return {"mae": float((logits - labels).abs().mean())}
    if problem == "single_label_classification":
        guessed = {(i, int(row.argmax())) for i, row in enumerate(logits)}
        true = {(i, int(label)) for i, label in enumerate(labels)}
    else:
        guessed, true = ({(int(i), int(c)) for i, c in found.nonzero()} for found in (logits > 0, labels > 0))

    def f1(guess: set[tuple[int, int]], truth: set[tuple[int, int]]) -> float:
        precision, recall = (len(guess & truth) / max(len(found), 1) for found in (guess, truth))
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    def of(found: set[tuple[int, int]], at: int, value: int) -> set[tuple[int, int]]:
        return {pair for pair in found if pair[at] == value}

    right = [of(guessed, 0, i) == of(true, 0, i) for i in range(len(logits))]
    macro = [f1(of(guessed, 1, c), of(true, 1, c)) for c in range(count)]
    micro = {} if problem.startswith("single") else {"micro_f1": f1(guessed, true)}
    return {"accuracy": sum(right) / len(right), **micro, "macro_f1": sum(macro) / count}


@pytest.mark.parametrize("centre, with_margins", [(0.0, False), (0.01, False), (0.3, True)])
def test_reward_loss_is_trls(
    centre: float, with_margins: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, 300, (6, 11), generator=generator)
    margins = torch.rand(3, generator=generator) if with_margins else None
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model("qwen3"), num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    args = trl.RewardConfig(
        output_dir=str(tmp_path), center_rewards_coefficient=centre, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.RewardTrainer(
        model=model, args=args, processing_class=AutoTokenizer.from_pretrained(tiny_model("qwen3")),
        train_dataset=Dataset.from_list([{"chosen": "a", "rejected": "b"}]),
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = trainer.compute_loss(model, {**inputs, **({} if margins is None else {"margin": margins})})
    expected.backward()
    gradient = model.score.weight.grad.clone()
    model.zero_grad()
    chosen, rejected = model(**inputs).logits.squeeze(-1).chunk(2)
    loss = RewardLoss(centre)
    sums = loss.sums(chosen, rejected, margins)
    torch.testing.assert_close(loss.total(sums), expected.detach(), rtol=1e-6, atol=1e-7)
    loss.total(sums).backward()
    torch.testing.assert_close(model.score.weight.grad, gradient, rtol=1e-5, atol=1e-7)
    told = loss.metrics({name: float(value) for name, value in sums.items()})
    theirs = {name: values[-1] for name, values in trainer._metrics["eval"].items() if values}
    assert told["loss"] == pytest.approx(float(expected))
    assert told["rewards/accuracies"] == pytest.approx(theirs["accuracy"])
    assert told["rewards/margins"] == pytest.approx(theirs["margin"], abs=1e-6)
