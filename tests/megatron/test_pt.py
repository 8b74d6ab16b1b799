"""`megatron pt`: plain text, the same packed sequences and losses as `pt` with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.llm.train.sft import pt_main
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.megatron.trainers.sft import megatron_pt_main
from swiftlite.train.plot import read_run

TEXTS = [f"{i} brown foxes jump over the lazy dog. " * (i % 4 + 1) for i in range(24)]
STEPS = 20


@pytest.fixture
def run(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """run(main, output, family, flag=value...) -> the lines of logging.jsonl."""
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def start(main: Any, output: str, family: str = "qwen3", **flags: Any) -> list[dict[str, Any]]:
        settings = {
            "model": tiny_model(family, vocab_size=333), "model_type": {"qwen3": "qwen3", "glm4_moe": "glm4_5"}[family],
            "dataset": data, "output_dir": tmp_path / output, "torch_dtype": "float32", "max_length": 120,
            "micro_batch_size": 1, "global_batch_size": 2, "train_iters": STEPS, "lr": 1e-3, "adam_eps": 1e-5,
            "logging_steps": 1, "report_to": "none", "save_weights_only": "true", **flags,
        }  # fmt: skip
        main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
        return read_run(tmp_path / output / "logging.jsonl")

    return start


@pytest.mark.parametrize("family, flags", [("qwen3", {}), ("glm4_moe", {}), ("qwen3", {"enable_dft_loss": "true"})])
def test_equal_to_transformers(family: str, flags: dict[str, str], run: Callable[..., list[dict[str, Any]]]) -> None:
    """fp32, 20 steps over packed sequences: losses and gradient norms within 1e-5, and the loss falls by a quarter."""
    theirs, ours = run(pt_main, "hf", family, **flags), run(megatron_pt_main, "mcore", family, **flags)
    assert len(theirs) == len(ours) == STEPS
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5), name
    if not flags:  # a loss by probability begins near 0, and rises as tokens become probable
        assert ours[-1]["loss"] < 0.75 * ours[0]["loss"]


def test_texts_end_with_the_end_token(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MicroBatch] = []
    load = BatchLoader.load

    def spy(self: BatchLoader, *args: Any) -> list[MicroBatch]:
        batches = load(self, *args)
        seen.extend(batches)
        return batches

    monkeypatch.setattr(BatchLoader, "load", spy)
    run(megatron_pt_main, "run", train_iters=1, max_length=200)
    assert sum(len(batch.sample_lengths) for batch in seen) > len(seen), "several texts in a sequence"
    for batch in seen:
        tokens, labels, bounds = batch.tokens[0], batch.labels[0], batch.cu_seqlens
        assert bounds is not None
        ends = bounds[1:].long() - 1
        assert tokens[ends].tolist() == [2] * len(ends), "</s> behind each text"
        trained = torch.ones(len(tokens))
        trained[ends] = 0  # nothing follows the end of a text
        assert torch.equal(batch.loss_mask[0], trained), "every other token predicts the next, the last one the end"
        assert torch.equal(labels[:-1][trained[:-1] > 0], tokens[1:][trained[:-1] > 0])


def test_joined_sequences_filled_up_to_one_shape() -> None:
    """As on GPUs, so that all steps can be one graph: the same tokens, then padding, and samples without tokens."""
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (7, 3, 9, 12)]
    plain, filled = (
        BatchLoader(rows, 0, 1, torch.device("cpu"), join=True, room=room).load([[0, 1], [2, 3]]) for room in (0, 32)
    )
    assert {batch.tokens.shape for batch in filled} == {(1, 32)} and len({b.cu_seqlens.shape for b in filled}) == 1
    for short, long in zip(plain, filled, strict=True):
        size = short.tokens.shape[1]
        assert short.longest == max(short.sample_lengths) and long.longest == 32
        assert torch.equal(long.tokens[:, :size], short.tokens) and not long.loss_mask[:, size:].any()
        bounds = long.cu_seqlens.tolist()
        assert bounds[: len(short.cu_seqlens)] == short.cu_seqlens.tolist()
        assert set(bounds[len(short.cu_seqlens) :]) == {32}
