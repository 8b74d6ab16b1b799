"""swiftlite.api: objects in place of command lines, and the example that uses them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import swiftlite
from swiftlite import api
from swiftlite.api import convert, train
from swiftlite.utils.errors import UsageError

ROOT = Path(__file__).parents[1]
ROWS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]} for i in range(8)
]
SHORT: dict[str, Any] = {"train_iters": 2, "global_batch_size": 2, "logging_steps": 1, "report_to": ["none"]}


def test_import_is_light_and_checkpoint_is_the_packages_too() -> None:
    code = "import swiftlite.api, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    from swiftlite.api import Checkpoint

    assert swiftlite.Checkpoint is Checkpoint
    with pytest.raises(AttributeError, match="it has Checkpoint, Run, convert, train"):
        _ = __import__("swiftlite.api").api.load


def test_wrong_words_say_what_is_allowed() -> None:
    for words, said in [
        ({"objective": "grpo"}, "objective grpo: must be one of .*dpo.*sft"),
        ({"objective": "export"}, "objective export: must be one of"),
        ({"side": "jax"}, "side jax: must be transformers or megatron"),
        ({"lora_rnk": 4}, "--lora_rnk: unknown flag; did you mean --lora_rank"),
        ({"lr": -1}, "--lr -1: must be 0 or more"),
    ]:
        with pytest.raises(UsageError, match=said):
            train(**{"objective": "sft", "model": "ORG/NAME", "dataset": "a#1", "output_dir": "out", **words})  # type: ignore[arg-type]
    for words, said in [
        ({"model": 5}, "model: must be a path or a hub's id, not a int"),
        ({"dataset": ROWS[0]}, "dataset: must be a path, .* or a list of rows"),
        ({"dataset": []}, "dataset: must be .* at least one"),
        ({"dataset": 5}, "dataset: must be a path"),
        ({"dataset": ["a.jsonl", ROWS[0]]}, "dataset: must be a path"),
        ({"callbacks": [swiftlite.Callback]}, "must be an object of a class made from swiftlite.Callback"),
    ]:
        with pytest.raises(UsageError, match=said):
            train(**{"objective": "sft", "model": "ORG/NAME", "dataset": "a#1", "output_dir": "out", **words})  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'convert'; `from swiftlite.api import convert`"):
        swiftlite.__getattr__("convert")
    with pytest.raises(UsageError, match="to torch: must be mcore or hf"):
        convert("DIR", "out", to="torch")


def test_both_sides_from_rows_and_back(
    tiny_model: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen2")
    api._quiet.cache_clear()  # pytest gives each test filters of its own
    seen: list[int] = []

    class Watch(swiftlite.Callback):
        def on_step(self, run: object, step: int, values: object) -> None:
            seen.append(step)

    run = train("sft", model, (row for row in ROWS), tmp_path / "hf", callbacks=[Watch()], **SHORT)  # type: ignore[arg-type]
    assert run.summary["iteration"] == 2 and f"{len(ROWS)} rows" in caplog.text  # the first one too
    assert repr(swiftlite.Checkpoint.open(model)) == f"<Checkpoint {model}: hf, 27 tensors>"
    assert seen == [1, 2]
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn("Apex is not installed. Falling back", UserWarning, stacklevel=1)
    assert not shown, "what the command leaves out"
    assert [line["step"] for line in run.history][:2] == [1, 2] and run.checkpoint.name == "checkpoint-2"
    again = train("sft", model, ROWS, tmp_path / "hf", **SHORT, extend=True, num_train_epochs=None)
    assert again.summary["iteration"] == 2  # the same rows, the same run
    mcore = convert(model, tmp_path / "mcore", to="mcore")
    other = train("sft", mcore, ROWS, tmp_path / "megatron", side="megatron", **SHORT)
    assert other.history[0]["loss"] == pytest.approx(run.history[0]["loss"], rel=1e-5)
    assert seen == [1, 2]  # of that run only
    back = convert(other.checkpoint, tmp_path / "back", to="hf")
    assert (back / "config.json").is_file()


def test_a_run_that_a_signal_ended_says_so(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    class Terminate(swiftlite.Callback):
        def on_step(self, run: object, step: int, values: object) -> None:
            signal.raise_signal(signal.SIGTERM)

    settings = {**SHORT, "train_iters": 4}
    run = train("sft", tiny_model("qwen2"), ROWS, tmp_path / "run", callbacks=[Terminate()], **settings)
    assert run.stopped_by == signal.SIGTERM and run.checkpoint.name == f"checkpoint-{run.summary['iteration']}"
    assert run.summary["iteration"] < 4
    again = train("sft", tiny_model("qwen2"), ROWS, tmp_path / "run", **settings)
    assert again.stopped_by is None and again.summary["iteration"] == 4
    assert [line["step"] for line in again.history] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_example_runs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "examples/python_api.py"), str(tiny_model("qwen2")), "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = next(line for line in done.stdout.splitlines() if line.startswith("loss"))[5:].split(" -> ")
    assert float(last) < float(first)
    assert (tmp_path / "out/run/loss.png").is_file() and "mcore out/mcore" in done.stdout
