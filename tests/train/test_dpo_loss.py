"""Pair losses and log-probabilities against trl's DPOTrainer: pairs of different lengths, a reference that differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.arguments.parser import from_dict, given_values, parse
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.task import PAIR_LOSS_TYPES, REFERENCE_FREE
from swiftlite.train.dpo_loss import LogProbs, PairLoss, answer_log_probs, sum_log_probs
from swiftlite.train.reference import pair_loss
from swiftlite.utils.errors import UsageError

LENGTHS = [(9, 4, 7), (12, 6, 2), (5, 3, 9)]  # prompt, chosen answer, rejected answer


def pairs() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(6, 300, (count,), generator=generator).tolist()

    return [{"prompt": ids(p), "chosen": ids(c), "rejected": ids(r)} for p, c, r in LENGTHS]


@pytest.fixture
def models(tiny_model: Callable[..., Path]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return tuple(load(tiny_model("qwen3", seed=seed), dtype=torch.float32) for seed in (0, 1))  # type: ignore[return-value]


def our_batch() -> dict[str, torch.Tensor]:
    """As PairCollator makes them: chosen ones first."""
    rows = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs()]
    longest = max(len(p) + len(a) for p, a in rows)
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
    for i, (prompt, answer) in enumerate(rows):
        size = len(prompt) + len(answer)
        ids[i, :size] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : size] = torch.tensor(answer)
        mask[i, :size] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def of_model(model: Any) -> LogProbs:
    batch = our_batch()
    return answer_log_probs(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )


class _Collected(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        self[key] = []
        return self[key]


def trl_loss(
    models: tuple[Any, Any], tiny_model: Callable[..., Path], tmp_path: Path, **config: Any
) -> tuple[Any, Any]:
    """(loss, metrics) of trl's own code on the same pairs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
                         gradient_checkpointing=False, disable_dropout=False, **config)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("qwen3"))
    trainer = trl.DPOTrainer(
        model=models[0],
        ref_model=models[1],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = our_batch()
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "completion_mask": (batch["labels"] != -100).long(),
    }
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items() if values}


WITH_REFERENCE = [name for name in PAIR_LOSS_TYPES if name not in REFERENCE_FREE]


MIXED = ["--loss_type", "sft", "bco_pair", "sigmoid", "--loss_weights", "1.5", "0.2", "0.8"]


@pytest.mark.parametrize(
    "loss_type, rpo_alpha", [*((name, None) for name in WITH_REFERENCE), ("hinge", 0.7), ("mixed", None)]
)
def test_equal_to_trl(
    loss_type: str, rpo_alpha: float | None, models: tuple[Any, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Loss, gradients, log-probabilities, rewards, margins and accuracy."""
    kinds = {"loss_type": [loss_type]} if rpo_alpha is None else {
        "loss_type": [loss_type, "sft"], "loss_weights": [1.0, rpo_alpha]}  # fmt: skip
    if loss_type == "mixed":
        kinds = {"loss_type": MIXED[1:4], "loss_weights": [float(weight) for weight in MIXED[5:]]}
    smoothing = 0.2 if loss_type == "robust" else 0.0
    theirs, metrics = trl_loss(models, tiny_model, tmp_path, label_smoothing=smoothing, **kinds)
    theirs.backward()
    wanted = {name: p.grad.clone() for name, p in models[0].named_parameters()}
    models[0].zero_grad()

    ours = PairLoss(loss_type, 0.3, smoothing, rpo_alpha)
    if loss_type == "mixed":
        ours = pair_loss(parse(DpoArguments, ["--model", "DIR", "--beta", "0.3", *MIXED]))
    with torch.no_grad():
        reference = of_model(models[1])
    sums = ours.sums(of_model(models[0]), reference)
    loss = ours.total(sums["loss"], sums["pairs"], sums["nll"], sums["chosen_tokens"])
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    if loss_type == "sigmoid":
        assert abs(sums["loss"].item() / 3 - math.log(2)) > 1e-2, "the reference differs from the policy"
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, parameter in models[0].named_parameters():
        assert (parameter.grad - wanted[name]).norm() <= 1e-4 * max(wanted[name].norm(), 1e-6 * whole), name
    mine = ours.metrics({name: float(value.detach()) for name, value in sums.items()})
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert mine[name] == pytest.approx(metrics[name], rel=1e-4), name


def test_words_of_mixtures() -> None:
    one, other = (
        parse(DpoArguments, ["--model", "DIR", *words])
        for words in (MIXED, ["--loss_weights", "sft=1.5", "bco_pair=0.2", "sigmoid=0.8"])
    )
    assert one.mixture == other.mixture == {"sft": 1.5, "bco_pair": 0.2, "sigmoid": 0.8}
    assert one.loss_type == other.loss_type == "bco_pair"
    again = from_dict(MegatronDpoArguments, given_values(one))
    assert again.mixture == one.mixture and pair_loss(again) == pair_loss(one)
    assert parse(DpoArguments, ["--loss_type", "sigmoid", "sft"]).mixture == {"sigmoid": 1.0, "sft": 1.0}
    assert parse(DpoArguments, ["--loss_type", "hinge"]).mixture == {}
    for words, said in [
        (["--loss_type", "sigmoid", "ipo"], "must be two or more of sigmoid, hinge"),
        (["--loss_type", "sigmoid", "sigmoid"], "each of them once"),
        (["--loss_type", "sigmoid", "--loss_weights", "1"], "must be two or more of"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1"], "a number for each of the 2 losses"),
        (["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "-1"], "a number for each of the 2 losses"),
        (["--loss_type", "sigmoid", "sft", "--rpo_alpha", "0.5"], "--rpo_alpha 0.5: is the weight of sft"),
        (["--rlhf_type", "kto", "--loss_weights", "kto=1", "sft=1"], "added up with --rlhf_type dpo only"),
        (["--loss_type", "hinge", "sft", "--label_smoothing", "0.1"], "goes with --loss_type sigmoid, robust"),
    ]:
        with pytest.raises(UsageError, match=said):
            parse(DpoArguments, words)


def log_probs(*values: float) -> LogProbs:
    return LogProbs(torch.tensor(values), torch.tensor([4.0, 2.0, 8.0, 1.0])[: len(values)])


def test_losses_without_a_reference_equal_trl() -> None:
    """Losses, rewards and gradients of CPO, SimPO (both smoothed) and ORPO from the same log-probabilities."""
    cpo, orpo = (pytest.importorskip(f"trl.experimental.{name}.{name}_trainer") for name in ("cpo", "orpo"))
    device = SimpleNamespace(device="cpu")
    settings = {"accelerator": device, "alpha": 0.0, "beta": 0.7, "label_smoothing": 0.1, "simpo_gamma": 0.5}
    tokens = torch.tensor([4.0, 2.0, 8.0, 1.0])
    for kind in REFERENCE_FREE:
        sums = torch.tensor([-3.0, -5.0, -6.0, -4.0], requires_grad=True)
        loss = PairLoss(kind, 0.7, 0.0 if kind == "orpo" else 0.1, 1.0, 0.5)
        mine = loss.sums(LogProbs(sums, tokens), None)
        (gradient,) = torch.autograd.grad(mine["loss"], sums)
        chosen, rejected = (sums if kind == "cpo" else sums / tokens).chunk(2)
        if kind == "orpo":
            losses, *rewards = orpo.ORPOTrainer.odds_ratio_loss(SimpleNamespace(**settings), chosen, rejected)[:3]
            losses = -losses
        else:
            theirs = SimpleNamespace(loss_type="simpo" if kind == "simpo" else "sigmoid", **settings)
            losses, *rewards = cpo.CPOTrainer.cpo_loss(theirs, chosen, rejected)
        torch.testing.assert_close(mine["loss"], losses.sum())
        torch.testing.assert_close(gradient, torch.autograd.grad(losses.sum(), sums)[0])
        for name, reward in zip(("chosen", "rejected"), rewards, strict=True):
            torch.testing.assert_close(mine[f"rewards/{name}"], reward.sum())
    certain = PairLoss("orpo")(LogProbs(torch.zeros(2, requires_grad=True), torch.ones(2)), None)
    certain.sum().backward()
    assert torch.isfinite(certain).all()


def test_losses_by_hand() -> None:
    policy, reference = log_probs(-3.0, -5.0, -6.0, -4.0), log_probs(-4.0, -4.0, -5.0, -7.0)
    margins = torch.tensor([2.0, -4.0])  # (1 - -1), (-1 - 3)
    sigmoid = -torch.nn.functional.logsigmoid(0.5 * margins)
    torch.testing.assert_close(PairLoss("sigmoid", 0.5)(policy, reference), sigmoid)
    flipped = -torch.nn.functional.logsigmoid(-0.5 * margins)
    torch.testing.assert_close(PairLoss("sigmoid", 0.5, 0.25)(policy, reference), 0.75 * sigmoid + 0.25 * flipped)
    torch.testing.assert_close(PairLoss("hinge", 0.5)(policy, reference), torch.tensor([0.0, 3.0]))
    per_token = torch.tensor([1 / 4 - -1 / 8, -1 / 2 - 3 / 1])
    torch.testing.assert_close(PairLoss("ipo", 0.5)(policy, reference), (per_token - 1.0) ** 2)


def test_micro_batches_add_up() -> None:
    """Losses of micro batches with the global batch's counts sum up to the loss of the whole."""
    loss = PairLoss("sigmoid", 0.5, rpo_alpha=0.3)
    policy, reference = log_probs(-3.0, -5.0, -6.0, -4.0), log_probs(-4.0, -4.0, -5.0, -7.0)
    whole = loss.sums(policy, reference)
    total = loss.total(whole["loss"], whole["pairs"], whole["nll"], whole["chosen_tokens"])
    parts = []
    for i in range(2):
        one = [LogProbs(x.sums[[i, i + 2]], x.tokens[[i, i + 2]]) for x in (policy, reference)]
        sums = loss.sums(*one)
        parts.append(loss.total(sums["loss"], whole["pairs"], sums["nll"], whole["chosen_tokens"]))
    torch.testing.assert_close(sum(parts), total)


def test_joined_answers_have_the_same_sums() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[0, :2] = labels[1, :4] = -100
    apart = answer_log_probs(logits, labels)
    joined_labels = labels.reshape(1, 12).clone()
    joined_labels[0, 6] = -100
    ids = torch.tensor([[0] * 6 + [1] * 6])
    joined = answer_log_probs(logits.reshape(1, 12, 11), joined_labels, ids, 2)
    torch.testing.assert_close(joined.sums, apart.sums)
    assert joined.tokens.tolist() == apart.tokens.tolist() == [4.0, 2.0]
    losses = torch.tensor([1.0, 2.0, 4.0])
    summed = sum_log_probs(losses, torch.tensor([1, 0, 1]), torch.tensor([1, 1, 0]), 2)
    assert summed.sums.tolist() == [-4.0, -1.0]


def test_sums_of_long_answers_do_not_depend_on_the_order() -> None:
    losses, ids = 12 + torch.rand(5000), torch.zeros(5000, dtype=torch.int64)
    orders = [torch.randperm(5000) for _ in range(4)]
    sums = {sum_log_probs(losses[order], torch.ones(5000), ids, 1).sums.item() for order in orders}
    assert sums == {torch.tensor(-math.fsum(losses.tolist())).item()}
