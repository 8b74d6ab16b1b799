"""The loss on labelled answers and its gradients against trl's KTOTrainer; which answers stand in for which; what is bad."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.parser import parse
from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.dataset.answers import AnswerDataset, say_balance
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.labels import labelled
from swiftlite.llm.dataset.preprocess import preprocess
from swiftlite.llm.dataset.report import DropReport
from swiftlite.llm.preview import preview_main
from swiftlite.train.batches import DUMMY, BatchPlan, neighbours
from swiftlite.train.dpo_loss import LogProbs
from swiftlite.train.kto_loss import KtoLoss
from swiftlite.utils.errors import UsageError
from tests.rows import answer_rows


class _Answering(torch.nn.Module):
    """A model whose answers have the given log-probabilities in one token, and mismatched ones others."""

    is_gradient_checkpointing = False

    def __init__(self, matched: torch.Tensor, mismatched: torch.Tensor) -> None:
        super().__init__()
        self.said = {0: matched, 1: mismatched}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        values = self.said[int(input_ids[0, 0])]
        other = torch.zeros_like(values)[:, None]
        return SimpleNamespace(log_probs=values[:, None], entropy=other, mean_logits=other)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [-4.0, 4.0], ids=["below", "above"])  # of the mismatched answers: kl is 0, or not
def test_equal_to_trl(loss_type: str, shift: float) -> None:
    """Loss, gradient and metrics of trl's own code on the same log-probabilities."""
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(5)
    policy, reference, others, other_reference = (torch.randn(5, generator=generator) - 20 for _ in range(4))
    policy.requires_grad_()
    others = others + shift
    label = torch.tensor([True, False, True, True, False])
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda value: value, unwrap_model=lambda model: model
    )
    trainer: Any = SimpleNamespace(
        model=_Answering(policy, others), ref_model=_Answering(reference, other_reference), accelerator=accelerator,
        calculate_KL=loss_type == "kto", precompute_ref_logps=False, aux_loss_enabled=False, loss_type=loss_type, beta=0.4,
        desirable_weight=0.8, undesirable_weight=1.3, _tp_size=1, _total_train_tokens=0,
        _metrics={"train": __import__("collections").defaultdict(list)},
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    trainer._compute_kl_logps = lambda model, batch: trl.KTOTrainer._compute_kl_logps(trainer, model, batch)
    batch = {f"{side}{name}": torch.ones(5, 2, dtype=torch.long) for side in ("", "KL_")
             for name in ("input_ids", "attention_mask", "completion_mask")}  # fmt: skip
    batch["input_ids"] = torch.zeros(5, 2, dtype=torch.long)
    theirs = trl.KTOTrainer._compute_loss(trainer, trainer.model, {**batch, "label": label}, False)
    (wanted,) = torch.autograd.grad(theirs, policy)

    loss = KtoLoss(loss_type, 0.4, 0.8, 1.3)
    ones = torch.ones(5)
    kl = loss.kl((others - other_reference).sum(), torch.tensor(5.0))
    assert (kl > 0) == (shift > 0)
    sums = loss.sums(LogProbs(policy, ones), LogProbs(reference, ones), label, kl)
    mine = sums["loss"] / sums["answers"]
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, policy)[0], wanted)
    metrics = loss.metrics({name: float(value.detach()) for name, value in sums.items()})
    for name in metrics.keys() - {"loss"}:
        assert metrics[name] == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5), name
    assert len(metrics) == 5 + 1 + (loss_type == "kto")


def test_of_a_kind_that_is_not_there_nothing_is_said() -> None:
    ones = torch.ones(2)
    sums = KtoLoss().sums(LogProbs(ones, ones), LogProbs(2 * ones, ones), torch.tensor([True, True]), torch.zeros(()))
    assert set(KtoLoss().metrics({name: float(v) for name, v in sums.items()})) == {
        "loss", "kl", "rewards/chosen", "logps/chosen",
    }  # fmt: skip


# ---- data ----


@pytest.fixture
def template(tiny_model: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    from swiftlite.llm.template import get_template

    return get_template("qwen3", AutoTokenizer.from_pretrained(tiny_model("qwen3")), loss_scale="last_round")


def test_mismatched_answers(template: Any) -> None:
    """A prompt with the answer before its own in the global batch, whatever the layout; cut as long as rows may be."""
    rows = [preprocess(row) for row in answer_rows(5)]
    samples = EncodedDataset(rows, template)
    dataset = AnswerDataset(samples, [row["label"] for row in rows], None)
    order = [3, 1, 4, 0]
    one = BatchPlan(4, 1, 0, 1).micro_batches(order)[0]
    two = [BatchPlan(1, 2, rank, 2).micro_batches(order) for rank in (0, 1)]
    assert [[int(i) for passed in rank for i in passed] for rank in two] == [[3, 4], [1, 0]]
    text = template.tokenizer.decode
    for place, index in enumerate(one):
        (item,) = dataset[index]["answers"]
        assert dataset[two[place % 2][place // 2][0]]["answers"] == [item]
        (before,) = dataset[order[place - 1]]["answers"]
        prompt, answer = (text([t for t, label in zip(x["input_ids"], x["labels"], strict=True) if (label == -100) == kept])
                          for x, kept in ((item, True), (before, False)))  # fmt: skip
        found = text(item["mismatched"]["input_ids"])
        assert found.startswith(prompt.rstrip("\n")) and answer in found and item["desirable"] == (index < 3)
    short = AnswerDataset(samples, dataset.desirable, 12)[one[0]]["answers"][0]["mismatched"]
    assert len(short["input_ids"]) == len(short["labels"]) == 12
    assert [getattr(i, "before", None) for i in neighbours([7, 8, DUMMY])] == [8, 7, None]
    questions = dataset.questions([order])
    assert len(questions) == 8 and "mismatched" not in dataset[3]["answers"][0]
    questions.remember([float(i) for i in range(8)])
    answers = [dataset[i]["answers"][0] for i in one]
    assert {a["reference"] for a in answers} | {a["mismatched"]["reference"] for a in answers} == set(range(8))
    changed = AnswerDataset(samples, [not good for good in dataset.desirable], None)
    assert changed.content_hash() != dataset.content_hash()
    packed = AnswerDataset(samples, dataset.desirable, None, capacity=2 * max(samples.lengths))
    assert 1 < len(packed) < 5 and packed.content_hash() != dataset.content_hash()
    batch = neighbours(range(len(packed)))
    flat = [i for item in packed.items for i in item]
    assert sorted(flat) == list(range(5)) and packed.lengths == [packed[i]["length"] for i in batch]
    answers = [answer for i in batch for answer in packed[i]["answers"]]
    for place, (index, before) in enumerate(zip(flat, [flat[-1], *flat[:-1]], strict=True)):
        assert answers[place]["desirable"] == dataset.desirable[index]
        assert answers[place]["mismatched"] == packed.sequence((index, before)) != packed.sequence((index, index))
    assert len(packed.questions([batch])) == 10


def test_labels_and_rows_without_one() -> None:
    message = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    weighed = [message[0], {**message[1], "loss": 0.5}]
    given = [True, 0, "True", "undesirable", None, "maybe", 2]
    rows = [preprocess({"messages": message, "label": label}) for label in given]
    rows += [
        preprocess({"messages": message, "rejected_response": "no"}),
        preprocess({"messages": weighed, "label": 1}),
    ]
    report = DropReport()
    kept = labelled(rows, report)
    assert [row["label"] for row in kept] == [True, True, False, True, False, False]
    assert kept[0]["messages"][-1]["content"] == "!" and kept[-1]["messages"][-1]["content"] == "no"
    assert report.reasons == {"no label true or false": 3, "a loss weight other than 0 and 1": 1} and report.total == 9
    assert report.examples["no label true or false"][1:] == ["row 5 label is 'maybe'", "row 6 label is 2"]


def test_balance(caplog: pytest.LogCaptureFixture) -> None:
    """As trl warns: the ratio of the weighted numbers should be between 1 and 4/3."""
    with caplog.at_level(logging.WARNING, logger="swiftlite"):
        say_balance([True, False], 1.0, 3.0)
        say_balance([True, True, False], 1.0, 2.0)
        assert not caplog.messages
        say_balance([True, True, False], 1.0, 1.0)
        say_balance([True, True], 1.0, 1.0)
        say_balance([False], 1.0, 1.0)
    assert "--desirable_weight 0.50 to 0.67, or --undesirable_weight 1.50 to 2.00" in caplog.messages[0]
    assert ["all 2 answers are desirable" in caplog.messages[1], "all 1 answers are undesirable" in caplog.messages[2]] == [
        True, True,
    ]  # fmt: skip


def test_preview_shows_answers_without_a_label(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = answer_rows(4)
    del rows[2]["label"]
    rows[3]["messages"][-1]["content"] = " "
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preview_main(["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--template", "qwen3", "--dataset",
                  str(tmp_path / "data.jsonl"), "--rlhf_type", "kto"])  # fmt: skip
    out = capsys.readouterr().out
    assert "2 of 4 rows used" in out and "2 desirable, 0 undesirable answers" in out
    assert re.search(r"no label true or false, first: \S*data.jsonl:3 give a column `label`", out)
    assert "the last answer is empty, first: " in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--loss_type", "sigmoid"], "--loss_type sigmoid: --rlhf_type kto has kto, apo_zero_unpaired"),
        (["--rpo_alpha", "1"], "adds no cross entropy"),
        (["--streaming", "true"], "not available for preference pairs"),
        (["--loss_scale", "all"], "must know where answers begin"),
    ],
)
def test_what_does_not_go_together(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(DpoArguments, ["--model", "A/B", "--rlhf_type", "kto", *words])
    elsewhere = {"--loss_type": ("kto", "--loss_type kto: --rlhf_type dpo has sigmoid, ipo"),
                 "--desirable_weight": ("2", "goes with --rlhf_type kto only")}  # fmt: skip
    for flag, (value, said) in elsewhere.items():
        with pytest.raises(UsageError, match=said):
            parse(DpoArguments, ["--model", "A/B", flag, value])
