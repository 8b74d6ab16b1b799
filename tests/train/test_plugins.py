"""The plugins of examples/plugins, in runs on either side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.arguments import parser
from swiftlite.checkpoint import resolve
from swiftlite.llm.template import loss_scale
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.train import plugins
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import UsageError

EXAMPLES = Path(__file__).parents[2] / "examples/plugins"
ROWS = [{"query": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(8)]


@pytest.fixture(autouse=True)
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has read no plugin."""
    monkeypatch.setattr(resolve, "_registered", set())
    monkeypatch.setattr(parser, "REGISTERED", set())
    monkeypatch.setattr(plugins, "REGISTERED", parser.REGISTERED)
    kinds: list[dict[str, Any]] = [plugins.OBJECTIVES, plugins.OPTIMIZERS, loss_scale.PATTERNS]
    before = [dict(kind) for kind in kinds]
    yield
    plugins.CALLBACKS.clear()
    for kind, names in zip(kinds, before, strict=True):
        kind.clear()
        kind.update(names)


@pytest.fixture
def train(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """train(main, plugin, **flags) -> the lines of logging.jsonl."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(main: Any, plugin: str | None, **flags: Any) -> list[dict[str, float]]:
        output = tmp_path / f"{main.__name__}-{plugin}"
        settings = {
            "model": tiny_model("qwen3"), "model_type": "qwen3", "dataset": data, "output_dir": output, "lr": 1e-3,
            "torch_dtype": "float32", "micro_batch_size": 4, "global_batch_size": 8, "train_iters": 3, "logging_steps": 1,
            "lr_decay_style": "constant", "report_to": "none", **flags,
        }  # fmt: skip
        if plugin:
            settings["external_plugins"] = EXAMPLES / f"{plugin}.py"
        main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
        return read_run(Path(settings["output_dir"]) / "logging.jsonl")

    return run


SIDES = pytest.mark.parametrize("side", [sft_main, megatron_sft_main])


@SIDES
def test_callback(side: Any, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve.register_custom([str(EXAMPLES / "callback.py")])
    type(plugins.CALLBACKS[-1]).on_step.__globals__["ENOUGH"] = 100.0
    lines = train(side, "callback", val_dataset=tmp_path / "data.jsonl", eval_steps=1, train_iters=9)
    assert max(line["step"] for line in lines) <= 2
    said = capsys.readouterr().out
    assert "step 1: evaluated to " in said and "saved " in said


@SIDES
def test_loss_scale(side: Any, train: Any) -> None:
    plain, weighted = (
        train(side, None, train_iters=1),
        train(side, "loss_scale", loss_scale="default+numbers", train_iters=1),
    )
    assert weighted[0]["loss"] > 1.02 * plain[0]["loss"], "digits count twice"


def test_optimizer(train: Any, tmp_path: Path) -> None:
    train(sft_main, "optimizer", optim="momentum", train_iters=2)
    state = torch.load(tmp_path / "sft_main-optimizer/checkpoint-2/optimizer.pt", weights_only=True)
    assert all(set(of) == {"momentum_buffer"} for of in state["state"].values()) and state["state"]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.1, 0.0}


def test_objective(train: Any, tmp_path: Path) -> None:
    """Both sides take the same steps; evaluations stay cross entropies."""
    flags = {"token_loss": "focal", "val_dataset": tmp_path / "data.jsonl", "eval_steps": 1}
    theirs, mine = (train(side, "objective", **flags) for side in (sft_main, megatron_sft_main))
    assert len(theirs) == len(mine) == 6
    for one, two in zip(theirs, mine, strict=True):
        for name in {"loss", "eval_loss", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-5)
    losses = torch.tensor([0.1, 0.5, 3.0])
    focal = plugins.OBJECTIVES["focal"](losses)
    torch.testing.assert_close(focal, (1 - losses.neg().exp()).square() * losses)
    assert mine[2]["loss"] < 0.999 * mine[1]["eval_loss"], "of the same weights"


@SIDES
def test_registered_from_python(side: Any, train: Any, tmp_path: Path) -> None:
    """In a notebook there is no file of --external_plugins."""
    plugins.register_objective("half", lambda losses: losses / 2)
    whole = train(side, None, train_iters=1)
    half = train(side, None, train_iters=1, token_loss="half", output_dir=tmp_path / "half")
    assert half[0]["loss"] == pytest.approx(whole[0]["loss"] / 2, rel=1e-5)


@pytest.mark.parametrize("loss, gave", [(torch.mean, r"shape \[\]"), (lambda losses: None, "a NoneType")])
def test_an_objective_gives_one_loss_a_token(loss: Any, gave: str, train: Any) -> None:
    plugins.register_objective("wrong", loss)
    for side in (sft_main, megatron_sft_main):
        with pytest.raises(UsageError, match=f"--token_loss wrong: gave {gave} for losses of shape .*as many"):
            train(side, None, train_iters=1, token_loss="wrong")


def test_names_that_nobody_registered(train: Any) -> None:
    with pytest.raises(UsageError, match="--token_loss focus: must be one of dft"):
        train(sft_main, None, token_loss="focus")
    for side in (sft_main, megatron_sft_main):
        with pytest.raises(
            UsageError, match="--token_loss focus: neither built in nor registered .* they have dft, focal"
        ):
            train(side, "objective", token_loss="focus")
    with pytest.raises(UsageError, match="--optim speed: neither built in nor registered .* they have none"):
        train(sft_main, "objective", optim="speed")
    with pytest.raises(UsageError, match="--optim speed: Megatron divides Adam's states alone"):
        train(megatron_sft_main, "objective", optim="speed")
