"""Options that save memory compute what they compute without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.info import read_config
from swiftlite.megatron import backend
from swiftlite.megatron.trainers.machine import check_machine
from swiftlite.megatron.trainers.sft import SftTrainer, megatron_sft_main
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import UsageError
from tests.families.cases import config_of

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris is nice. " * (i % 3)}]}
    for i in range(8)
]  # fmt: skip


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[tuple[float, float]]]:
    """`train("name", flag=value, ...)` -> (loss, gradient norm) of each step."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(output: str, family: str = "qwen3", **flags: Any) -> list[tuple[float, float]]:
        settings = {
            "model": tiny_model(family, vocab_size=333), "model_type": {"glm4_moe": "glm4_5"}.get(family, family),
            "dataset": data, "output_dir": tmp_path / output, "torch_dtype": "bfloat16", "micro_batch_size": 2,
            "global_batch_size": 4, "train_iters": 6, "lr": 1e-3, "logging_steps": 1, "save_steps": 3, **flags,
        }  # fmt: skip
        megatron_sft_main([word for name, value in settings.items() for word in (f"--{name}", *str(value).split())])
        lines = read_run(tmp_path / output / "logging.jsonl")
        return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]

    return run


@pytest.mark.parametrize("fraction", [1, 0.5])
def test_offloaded_optimizer(fraction: float, train: Callable[..., Any], tmp_path: Path) -> None:
    """The same curve, also when a run resumes with states on the other side."""
    offload = {"optimizer_cpu_offload": "true", "optimizer_offload_fraction": fraction}
    plain, there = train("plain"), train("there", **offload)
    assert plain[-1][0] < 0.9 * plain[0][0]
    assert there == [pytest.approx(step, rel=2e-3) for step in plain]
    for before, after, flags in (("plain", "back", offload), ("there", "forth", {})):
        shutil.copytree(tmp_path / before, tmp_path / after)
        shutil.rmtree(tmp_path / after / "iter_0000006")
        (tmp_path / after / "latest_checkpointed_iteration.txt").write_text("3")
        assert train(after, **flags) == [pytest.approx(step, rel=2e-3) for step in plain]


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_loss_in_chunks(family: str, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses and gradients, and never more logits than a chunk's."""
    seen: list[int] = []
    usual = LanguageModule.compute_language_model_loss

    def compute(self: Any, labels: Any, logits: Any) -> Any:
        seen.append(logits.shape[0] * logits.shape[1])
        return usual(self, labels, logits)

    monkeypatch.setattr(LanguageModule, "compute_language_model_loss", compute)
    plain = train("plain", family, torch_dtype="float32")
    assert max(seen) > 60
    seen.clear()
    assert train("chunks", family, torch_dtype="float32", loss_chunk_size=30) == [
        pytest.approx(step, rel=1e-6) for step in plain
    ]
    assert 20 < max(seen) <= 30


def test_what_is_recomputed_of_latent_attention(train: Callable[..., Any]) -> None:
    plain = train("plain", "moonlight", torch_dtype="float32", train_iters=3)
    flags = {"recompute": "selective", "recompute_modules": "mla_up_proj layernorm"}
    again = train("again", "moonlight", torch_dtype="float32", train_iters=3, **flags)
    assert again == [pytest.approx(step, rel=1e-6) for step in plain]


@pytest.mark.parametrize(("family", "saves"), [("qwen3", False), ("glm4_5", True), ("moonlight", True)])
def test_norms_that_cannot_be_recomputed_alone_are_told(
    family: str, saves: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformer Engine has a norm of its own before experts and before latent attention."""
    found = replace(backend.setup(), spec="te")
    monkeypatch.setattr(backend, "setup", lambda: found)
    words = ["--model", "x", "--recompute", "selective", "--recompute_modules", "layernorm"]
    args = parse(MegatronSftArguments, words)
    args.apply_model_config(convert_hf_config(config_of(f"{family}:default")))
    with caplog.at_level("INFO", "swiftlite"):
        check_machine(args)
    assert ("layernorm saves nothing" in caplog.text) is not saves


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"use_precision_aware_optimizer": "true"}, "needs a GPU and Transformer Engine"),
        ({"optimizer_cpu_offload": "true", "torch_dtype": "float32"}, "train in --torch_dtype bfloat16"),
        ({"fine_grained_activation_offloading": "true", "offload_modules": "core_attn"}, "needs a GPU"),
        ({"fine_grained_activation_offloading": "true"}, "needs --offload_modules, some of attn_norm"),
        ({"fine_grained_activation_offloading": "true", "offload_modules": "moe_act"}, "has no experts"),
        ({"exp_avg_dtype": "bf16"}, "needs --use_precision_aware_optimizer true"),
        ({"fp8_format": "e4m3"}, "needs Transformer Engine and a GPU of compute capability 8.9"),
    ],
)
def test_what_cannot_be_is_said(flags: dict[str, str], said: str, train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        train("run", **flags)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_told_with_its_size(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: SftTrainer) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(SftTrainer, "step", step)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"2 x \d+ tokens take about 3.0 GB a GPU, .*activations .*take more GPUs"):
        train("run")


def test_fp8_wants_even_sizes(tiny_model: Callable[..., Path]) -> None:
    args = MegatronSftArguments(model="DIR", fp8_format="e4m3", tensor_model_parallel_size=2)
    config = convert_hf_config(read_config(tiny_model("qwen3")))
    with pytest.raises(UsageError, match="ffn_hidden_size of each rank must be a multiple of 16, not 24"):
        args.apply_model_config({**config, "ffn_hidden_size": 48})
