"""The divergence of distillation and its gradient against trl's, whole and of a vocabulary in parts; 20 steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.parser import parse
from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.preflight import preflight
from swiftlite.llm.train import gkd
from swiftlite.train.distill_loss import Divergence, Parts, Top, in_chunks, top_of
from swiftlite.train.plot import read_run
from swiftlite.train.reference import check_teacher, check_teacher_rows
from swiftlite.train.schedule import build_optimizer
from swiftlite.utils.errors import UsageError
from tests.rows import preference_rows

STEPS, BATCH, RATE = 20, 4, 1e-4


def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (3 * torch.randn(3, 5, 11, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher


def trl_trainer() -> Any:
    return pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_trl(beta: float, temperature: float) -> None:
    student, teacher = logits()
    labels = torch.arange(15).view(3, 5).masked_fill(torch.tensor([[1, 0, 0, 1, 0]] * 3).bool(), -100)
    theirs = trl_trainer().generalized_jsd_loss(student, teacher, labels, beta, temperature, num_items_in_batch=9)
    (wanted,) = torch.autograd.grad(theirs, student)
    there = labels != -100
    mine = Divergence(beta, temperature)(student[there], teacher[there]).sum() / 9
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(torch.autograd.grad(mine, student)[0], wanted)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_chunks_are_the_whole(size: int) -> None:
    """Losses and gradients, weighted afterwards; what else is told has none; no rows at all."""
    student, teacher = (logits.flatten(0, 1) for logits in logits())
    student = student.detach().requires_grad_()
    weights, seen = torch.linspace(-1, 2, len(student)), []

    def terms(part: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(part))
        return Divergence(0.3)(part, teacher[rows]), part.logsumexp(-1)

    whole, other = Divergence(0.3)(student, teacher), student.logsumexp(-1)
    (wanted,) = torch.autograd.grad((whole * weights).sum(), student)
    mine, told = in_chunks(terms, student, size * student.shape[1])
    torch.testing.assert_close((mine, told), (whole, other))
    assert max(seen) == min(size, len(student)) and sum(seen) == len(student) and not told.requires_grad
    torch.testing.assert_close(torch.autograd.grad((mine * weights).sum(), student)[0], wanted)
    none = in_chunks(
        lambda part, rows: (Divergence()(part, teacher[:0][rows]), part.sum(-1)), student[:0], size * student.shape[1]
    )
    assert [len(values) for values in none] == [0, 0]
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(terms, student, size * student.shape[1])[0], whole)


class _Meeting:
    """Two threads that stand for the ranks of a vocabulary in two parts."""

    def __init__(self) -> None:
        self.barrier, self.values = Barrier(2), [torch.empty(0)] * 2

    def gather(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self.values[rank] = value.detach()
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [None, 3, 11])
def test_a_vocabulary_in_parts(beta: float, k: int | None) -> None:
    """Each rank has the whole loss, and the gradient of its part; of a teacher's `k` likeliest tokens, too."""
    student, teacher = (values.flatten(0, 1) for values in logits())
    top = None if k is None else top_of(teacher, k, 1.0)
    whole = Divergence(beta)(student, teacher) if top is None else Divergence(beta).of_top(student, top)
    (wanted,) = torch.autograd.grad(whole.sum(), student)
    meeting, sizes = _Meeting(), [7, 4]

    def run(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        class Total(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
                return sum(meeting.gather(rank, value))

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                return grad

        class Shared(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
                return value.clone()

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                return sum(meeting.gather(rank, grad))

        parts = Parts(Total.apply, Shared.apply, lambda v: torch.stack(meeting.gather(rank, v)).amax(0))
        mine = student.detach().split(sizes, -1)[rank].clone().requires_grad_()
        losses = (
            Divergence(beta)(mine, teacher.split(sizes, -1)[rank], parts)
            if top is None
            else Divergence(beta).of_top(mine, top, parts, first=sum(sizes[:rank]))
        )
        losses.sum().backward()
        return losses.detach(), mine.grad

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    for losses, _ in found:
        torch.testing.assert_close(losses, whole.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found], -1), wanted)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_likeliest_tokens(beta: float) -> None:
    """All of them are the teacher itself; the fewer they are, the less is seen; the same as of K + 1 outcomes."""
    student, teacher = (values.flatten(0, 1) for values in logits())
    loss = Divergence(beta, 0.7)
    whole = loss(student, teacher)
    (wanted,) = torch.autograd.grad(whole.sum(), student)
    for k in (11, 20):
        mine = loss.of_top(student, top_of(teacher, k, 0.7))
        torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(mine.sum(), student)[0], wanted, rtol=1e-6, atol=1e-6)
    seen = [loss.of_top(student, top_of(teacher, k, 0.7)).detach() for k in (1, 4, 8)]
    for few, more in zip(seen, [*seen[1:], whole.detach()], strict=True):
        assert (few <= more + 1e-5).all() and few.sum() < more.sum()
    outcomes = []
    for values in (student, teacher):
        p, ids = (values.double() / 0.7).softmax(-1), (teacher / 0.7).topk(4).indices
        named = p.gather(1, ids)
        outcomes.append(torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1).log().float())
    torch.testing.assert_close(seen[1], Divergence(beta)(*outcomes).detach(), rtol=1e-5, atol=1e-5)


def test_tokens_that_a_student_has_not() -> None:
    """Rows of the teacher beyond the student's count for nothing, as where both models are there."""
    student, teacher = (values.flatten(0, 1) for values in logits())
    top = top_of(teacher, 11, 1.0).within(8)
    torch.testing.assert_close(
        Divergence(0.3).of_top(student[:, :8], top), Divergence(0.3)(student[:, :8], teacher[:, :8])
    )
    few = top_of(teacher, 3, 1.0)
    rounded = Top(few.ids, few.log_probs.half(), few.rest)
    torch.testing.assert_close(
        Divergence(0.3).of_top(student, rounded), Divergence(0.3).of_top(student, few), rtol=2e-3, atol=2e-4
    )
    assert few.ids.dtype == torch.int32 and few.log_probs.shape == (15, 3) and few.rest.shape == (15,)


def test_equal_to_trls_trainer(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, 20 steps: loss and gradient norm within 1e-5 relative, and the loss falls."""
    module = pytest.importorskip("trl.experimental.gkd")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[Any] = []
    load = gkd.load_taught
    monkeypatch.setattr(gkd, "load_taught", lambda *args: seen.append(load(*args)) or seen[-1])
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in preference_rows(8)))
    directory, teacher = (tiny_model("qwen3", seed=seed) for seed in (0, 1))
    flags = {
        "rlhf_type": "gkd", "model": directory, "teacher_model": teacher, "model_type": "qwen3", "template": "qwen3",
        "dataset": data, "output_dir": tmp_path / "ours", "torch_dtype": "float32", "global_batch_size": BATCH, "lr": RATE,
        "micro_batch_size": 2, "lr_decay_style": "constant", "adam_eps": 1e-5, "train_iters": STEPS, "beta": 0.3,
        "dataset_shuffle": "false", "logging_steps": 1, "report_to": "none", "save_weights_only": "true",
    }  # fmt: skip
    gkd.gkd_main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    mine = read_run(tmp_path / "ours/logging.jsonl")

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        out = {name: torch.full((len(rows), longest), fill) for name, fill in
               (("input_ids", 0), ("labels", -100), ("attention_mask", 0))}  # fmt: skip
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            out["input_ids"][i, :size], out["labels"][i, :size] = (
                torch.tensor(row[n]) for n in ("input_ids", "labels")
            )
            out["attention_mask"][i, :size] = 1
        return out

    class Trainer(module.GKDTrainer):  # type: ignore[misc,name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return [step % len(rows) for step in range(STEPS * BATCH)]

    rows = [{name: list(row[name]) for name in ("input_ids", "labels")} for row in seen[0][0]]
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (directory, teacher))
    args = module.GKDConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, lr_scheduler_type="constant", max_grad_norm=1.0, lmbda=0.0,
        beta=0.3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_dropout=False,
        gradient_checkpointing=False, disable_tqdm=True, per_device_train_batch_size=BATCH, learning_rate=RATE,
    )  # fmt: skip
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "optim": "adamw_torch", "loraplus_lr_ratio": None}
    optimizer = build_optimizer(model, SimpleNamespace(weight_decay=0.1, lr=RATE, **adam))
    trainer = Trainer(
        model=model, teacher_model=other, args=args, train_dataset=Dataset.from_list(rows), data_collator=collate,
        processing_class=AutoTokenizer.from_pretrained(directory),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    wanted = [line for line in trainer.state.log_history if "loss" in line]
    assert len(mine) == len(wanted) == STEPS
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in mine] == pytest.approx([line[name] for line in wanted], rel=1e-5), name
    assert mine[-1]["loss"] < 0.9 * mine[0]["loss"]


def test_what_cannot_be_distilled() -> None:
    words = ["--model", "A/B", "--rlhf_type", "gkd"]
    for more, said in (
        ([], "give the teacher with --teacher_model"),
        (["--teacher_model", "A/C", "--lmbda", "0.5"], "TRL's GKDTrainer or ms-swift do that"),
        (["--teacher_model", "A/C", "--beta", "2"], "between 0 and 1"),
        (["--teacher_model", "A/C", "--loss_type", "ipo"], "--rlhf_type gkd has none"),
        (["--teacher_model", "A/C", "--teacher_logits", "DIR"], "give the teacher with --teacher_model"),
        (["--teacher_model", "A/C", "--temperature", "0"], "must be above 0"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(DpoArguments, [*words, *more])
    with pytest.raises(UsageError, match="--teacher_model: goes with --rlhf_type gkd only"):
        parse(DpoArguments, ["--model", "A/B", "--teacher_model", "A/C"])
    args = parse(DpoArguments, [*words, "--teacher_model", "A/C", "--packing", "true", "--max_length", "8"])
    assert args.beta == 0.5 and args.loss_scale == "default" and not args.has_reference
    preflight(parse(DpoArguments, [*words, "--teacher_model", "A/C", "--dataset", "A/D"]))  # ids of a hub
    own = {"a": 0, "b": 1}
    check_teacher("A/C", own, dict(own))
    check_teacher_rows("A/C", 2, own)
    with pytest.raises(UsageError, match="another vocabulary .'[bc]', for one.* same family"):
        check_teacher("A/C", own, {"a": 0, "c": 1})
    with pytest.raises(UsageError, match="lacks rows for some"):
        check_teacher_rows("A/C", 1, own)
