"""--enable_channel_loss on both sides, against cross entropies that transformers computes row by row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.pipeline import prepare_template
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import UsageError

ROWS: list[Any] = [
    {"query": f"What is {i} plus {i}?", "response": f"It is {2 * i}. " + "Paris is nice. " * (i % 3)} for i in range(8)
]
for number, row in enumerate(ROWS):
    if number % 3 < 2:
        row["channel"] = ("sums", 7)[number % 3]  # and rows of none
WEIGHTS = {"nice": [0.25]}


def by_hand(model: Path, weights: str) -> dict[str, float]:
    """Channel -> mean over its tokens."""
    from transformers import AutoModelForCausalLM

    args = SftArguments(model=str(model), model_type="qwen3", loss_scale=weights)
    resolve(args)
    template, network = prepare_template(args), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sums: dict[str, list[float]] = {}
    for row in ROWS:
        turns = [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}]
        encoded: Any = template.encode({"messages": turns})
        with torch.no_grad():
            logits = network(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(encoded["labels"])[1:]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        weight = torch.tensor(encoded.get("loss_scale") or [1.0] * (len(labels) + 1))[1:]
        found = sums.setdefault(str(row.get("channel")), [0.0, 0.0])
        found[0] += float((losses * weight).sum())
        found[1] += int((labels != -100).sum())
    return {channel: total / count for channel, (total, count) in sums.items()}


@pytest.mark.parametrize("packing", ["false", "true"])
@pytest.mark.parametrize("main", [sft_main, megatron_sft_main])
def test_each_channel_has_its_own_mean(
    main: Callable[[list[str]], Any], packing: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    data, weights = tmp_path / "data.jsonl", tmp_path / "weights.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    weights.write_text(json.dumps(WEIGHTS))
    model = tiny_model("qwen3")
    words = ["--model", model, "--model_type", "qwen3", "--dataset", data, "--val_dataset", data, "--loss_scale", weights,
             "--output_dir", tmp_path / "run", "--torch_dtype", "float32", "--micro_batch_size", "2", "--train_iters", "1",
             "--global_batch_size", "2" if packing == "true" else "8", "--lr", "0", "--logging_steps", "1",
             "--packing", packing, "--max_length", "120", "--report_to", "none", "--enable_channel_loss", "true",
             "--eval_steps", "1", "--metric_for_best_model", "loss_sums"]  # fmt: skip
    main(list(map(str, words)))
    wanted = by_hand(model, str(weights))
    assert set(wanted) == {"sums", "7", "None"} and len({round(value, 3) for value in wanted.values()}) == 3
    trained, evaluated = read_run(tmp_path / "run/logging.jsonl")
    assert {n: evaluated[f"eval_loss_{n}"] for n in wanted} == pytest.approx(wanted, rel=1e-5)
    if packing == "false":
        assert {n: trained[f"loss_{n}"] for n in wanted} == pytest.approx(wanted, rel=1e-5)


def test_streams_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--model", tiny_model("qwen3"), "--model_type", "qwen3", "--dataset", data, "--output_dir", tmp_path / "run",
             "--train_iters", "1", "--enable_channel_loss", "true", "--streaming", "true"]  # fmt: skip
    with pytest.raises(UsageError, match="--enable_channel_loss true: .* leave out --streaming"):
        sft_main(list(map(str, words)))
