"""Replayed passes train as eager ones do, on fixed lengths, packed sequences, experts, adapters and preference pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_te import bf16_model, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

LORA = ["--train_type", "lora", "--target_modules", "all-linear", "--lora_dropout", "0"]
CASES: dict[str, tuple[str, str, list[str]]] = {
    "dense": ("qwen3:default", "sft", []),
    "packed": ("qwen3:default", "sft", ["--packing", "true"]),
    "linear packed": ("qwen3_next:default", "sft", ["--packing", "true", "--packing_length", "500"]),
    "moe": ("glm4_5:default", "sft", []),
    "moe lora": ("glm4_5:default", "sft", LORA),
    "dpo": ("qwen3:default", "dpo", LORA),
    "fp8 blockwise": ("qwen3:default", "sft", ["--fp8_format", "e4m3", "--fp8_recipe", "blockwise"]),
    "fp8 tensorwise": ("qwen3:default", "sft", ["--fp8_format", "hybrid", "--fp8_recipe", "tensorwise"]),
    "fp8 delayed": ("qwen3:default", "sft", ["--fp8_format", "hybrid", "--fp8_recipe", "delayed"]),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_of_replays_are_those_of_eager_passes(
    name: str, tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from swiftlite import megatron_dpo_main, megatron_sft_main
    from swiftlite.megatron.trainers.graphs import StepGraphs
    from swiftlite.train.plot import read_run

    case, kind, flags = CASES[name]
    bf16_model(config(case), tmp_path / "hf", tiny_tokenizer_dir)
    rows = []
    for number in range(64):
        text = " ".join(str((number * 7 + i * i) % 100) for i in range(300))
        messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages, **({"rejected_response": text[::-1]} if kind == "dpo" else {})})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tmp_path / "hf"), "--model_type", case.split(":")[0], "--template", "chatml"]
    words += ["--dataset", str(tmp_path / "data.jsonl"), "--train_iters", "8", "--lr", "1e-3", "--logging_steps", "1"]
    words += ["--global_batch_size", "8", "--micro_batch_size", "2", "--max_length", "128"]
    words += ["--truncation_strategy", "right", "--report_to", "none", "--save_weights_only", "true", *flags]
    captured: list[Any] = []
    usual = StepGraphs._capture
    monkeypatch.setattr(StepGraphs, "_capture", lambda *a: captured.append(usual(*a)) or captured[-1])
    main: Any = {"sft": megatron_sft_main, "dpo": megatron_dpo_main}[kind]
    losses = []
    for graph in ("true", "false"):
        main([*words, "--cuda_graph", graph, "--output_dir", str(tmp_path / graph)])
        lines = [line for line in read_run(tmp_path / graph) if "step_s" in line]
        losses.append(torch.tensor([line["loss"] for line in lines]))
        # Before the first update policy and reference are one model.
        assert lines[0].get("rewards/chosen", 0) == lines[0].get("rewards/rejected", 0) == 0
    assert len(captured) == 1 and captured[0] is not None
    assert len(losses[0]) == 8 and (losses[0] - losses[1]).abs().max() <= 0.02 * losses[1].abs().max()
