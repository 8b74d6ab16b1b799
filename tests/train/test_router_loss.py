"""Router losses: the formula against loops over tokens, and what a step adds of them, on both sides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.train.router_loss import PADDING, RouterLoss, RouterWatch, sequences_of
from swiftlite.utils.errors import UsageError

COEFF = 2.0  # large, so that the gradient's norm shows its weight


def balance(logits: torch.Tensor, topk: int, score_function: str) -> float:
    """E * sum over experts of (share of all choices) * (mean score) of these tokens, written out."""
    experts, tokens = logits.shape[1], len(logits)
    chosen, mass = [0.0] * experts, [0.0] * experts
    for row in logits.tolist():
        scores = [math.exp(x) if score_function == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
        scores = [s / sum(scores) for s in scores]
        for expert in sorted(range(experts), key=lambda e: -scores[e])[:topk]:
            chosen[expert] += 1
        mass = [m + s for m, s in zip(mass, scores, strict=True)]
    return experts * sum(c / (topk * tokens) * m / tokens for c, m in zip(chosen, mass, strict=True))


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_formula_counts_real_tokens_only(score_function: str) -> None:
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sequences = torch.tensor([0, 0, 0, PADDING, 1, 1, PADDING, 1, 1])
    first, second = logits[:3], logits[[4, 5, 7, 8]]
    both, lengths = torch.cat([first, second]), torch.tensor([3, 4])

    def value(**kwargs: Any) -> float:
        return RouterLoss(2, score_function, **kwargs)(logits, sequences, lengths).item()

    assert value(balance=0.5) == pytest.approx(0.5 * balance(both, 2, score_function))
    mean = (balance(first, 2, score_function) + balance(second, 2, score_function)) / 2
    assert value(balance=0.5, by_sequence=True) == pytest.approx(0.5 * mean)
    squares = sum(math.log(sum(math.exp(x) for x in row)) ** 2 for row in both.tolist()) / 7
    assert value(z=0.1, balance=0.5) == pytest.approx(0.1 * squares + 0.5 * balance(both, 2, score_function))


def test_sequences_of_padded_and_joined_batches() -> None:
    padded, lengths = sequences_of({"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])})
    assert (padded.tolist(), lengths.tolist()) == ([0, 0, PADDING, PADDING, 1, 1], [2, 2])
    joined, lengths = sequences_of(
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "attention_mask": torch.ones(1, 1, 5, 5)}
    )
    assert (joined.tolist(), lengths.tolist()) == ([0, 0, 0, 1, 1], [3, 2])


# ---- a training step on both sides ----

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}? " * (1 + i % 3)},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris is nice. " * (3 * i % 5)}],
     "rejected_response": "No idea."}
    for i in range(8)
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("router") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def steps(command: str, model: Path, data: Path, output: Path, **flags: Any) -> list[dict[str, float]]:
    """Log lines of a run. command: as typed after `swiftlite`."""
    from swiftlite.llm.train.dpo import dpo_main
    from swiftlite.llm.train.sft import sft_main
    from swiftlite.megatron.trainers.dpo import megatron_dpo_main
    from swiftlite.megatron.trainers.sft import megatron_sft_main

    main: Any = {"sft": sft_main, "dpo": dpo_main, "megatron sft": megatron_sft_main, "megatron dpo": megatron_dpo_main}
    settings = {
        "model": model, "dataset": data, "output_dir": output / command.replace(" ", "-"), "torch_dtype": "float32",
        "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 2, "lr": 1e-3, "lr_decay_style": "constant",
        "clip_grad": 1e9, "adam_eps": 1e-5, "logging_steps": 1, "save_weights_only": "true", "report_to": "none",
        "dataset_shuffle": "false", **flags,
    }  # fmt: skip
    words = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    main[command]([str(word) for name, values in words.items() for word in (f"--{name}", *values)])
    log = output / command.replace(" ", "-") / "logging.jsonl"
    return [line for line in map(json.loads, log.read_text().splitlines()) if "grad_norm" in line]


def curve(log: list[dict[str, float]]) -> list[float]:
    return [line[name] for line in log for name in ("loss", "grad_norm")]


def plain_gradient_norm(model_dir: Path, coeff: float) -> float:
    """Of the answers' mean loss + coeff * the mean over two micro batches of the layers' losses, one row at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftlite.llm.template.register import get_template

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    template = get_template("qwen3", AutoTokenizer.from_pretrained(model_dir))
    rows = [template.encode(row) for row in ROWS]
    trained = sum(label != -100 for row in rows for label in row["labels"][1:])
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda gate, inputs, _: seen.append(torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight))
        )
    total = torch.zeros(())
    for half in (rows[:4], rows[4:]):
        layers: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
        for row in half:
            seen.clear()
            logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total = (
                total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / trained
            )
            for mine, found in zip(layers, seen, strict=True):
                mine.append(found)
        for mine in layers:
            logits, scores = torch.cat(mine), torch.cat(mine).softmax(-1)
            chosen = torch.zeros_like(scores).scatter(1, logits.topk(2).indices, 1.0)
            total = total + coeff / 2 * 4 * (chosen.mean(0) / 2 * scores.mean(0)).sum()
    total.backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))


def test_a_step_adds_the_mean_over_micro_batches(tiny_model: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Whatever the share of trained tokens and padding, with and without --calculate_per_token_loss."""
    model = tiny_model("qwen3_moe")
    wanted = plain_gradient_norm(model, COEFF)
    assert wanted > 1.2 * plain_gradient_norm(model, 0.0), "the test is blind to the router's loss"
    flags = {"train_iters": 1, "router_aux_loss_coef": COEFF}
    for command in ("sft", "megatron sft"):
        (line,) = steps(command, model, data, tmp_path, **flags)
        assert line["grad_norm"] == pytest.approx(wanted, rel=1e-5), command


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("sft", {"packing": "true", "packing_length": 256, "moe_router_load_balancing_type": "seq_aux_loss"}),
        ("sft", {"moe_router_load_balancing_type": "seq_aux_loss", "recompute": "full"}),
        ("dpo", {"micro_batch_size": 2, "global_batch_size": 4}),
    ],
    ids=["packed", "padded", "pairs"],
)
def test_both_sides_agree(
    kind: str, flags: dict[str, Any], tiny_model: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    flags = {**flags, "moe_aux_loss_coeff": COEFF, "moe_z_loss_coeff": 0.1}
    model = tiny_model("qwen3_moe")
    one, two = (curve(steps(command, model, data, tmp_path, **flags)) for command in (kind, f"megatron {kind}"))
    assert two == pytest.approx(one, rel=1e-5)


def test_what_cannot_act_is_said(caplog: pytest.LogCaptureFixture) -> None:
    from swiftlite.arguments.train import SftArguments

    args = SftArguments(model="M", dataset=["D"], moe_aux_loss_coeff=0.1)
    assert RouterLoss.of(args, {}) is None
    args = SftArguments(model="M", dataset=["D"], moe_aux_loss_coeff=0.1, moe_router_load_balancing_type="none")
    assert RouterLoss.of(args, {"num_experts": 4, "moe_router_topk": 2}) is None
    assert ["no experts" in caplog.messages[0], "is none" in caplog.messages[1]] == [True, True]
    with pytest.raises(UsageError, match="sinkhorn: sends tokens to other experts"):
        SftArguments(model="M", dataset=["D"], moe_router_load_balancing_type="sinkhorn")
    with pytest.raises(UsageError, match="Linear has no router named mlp.gate"):
        RouterWatch(torch.nn.Linear(2, 2), RouterLoss(2, "softmax", 0.1))
    with pytest.raises(UsageError, match="--moe_aux_loss_coeff -1"):
        SftArguments(model="M", dataset=["D"], moe_aux_loss_coeff=-1.0)
