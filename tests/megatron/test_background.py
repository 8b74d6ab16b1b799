"""`--async_save true`: training continues while a snapshot is written; what is not finished does not count."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.cli.main import main
from swiftlite.megatron import background
from swiftlite.megatron.background import BackgroundWriter, Write
from swiftlite.megatron.trainers import run
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import write_text_atomic


@pytest.fixture
def words(tiny_model: Callable[..., Path], tmp_path: Path) -> list[str]:
    data = tmp_path / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Paris is nice."}]}
    data.write_text((json.dumps(row) + "\n") * 8)
    values = {
        "model": tiny_model("glm4_moe"), "model_type": "glm4_5", "dataset": data, "torch_dtype": "float32",
        "global_batch_size": 2, "train_iters": 6, "lr": 1e-3, "lr_decay_style": "constant", "logging_steps": 1,
        "save_steps": 2, "report_to": "none",
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def curve(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "logging.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "grad_norm" in line]


def test_the_snapshot_is_of_the_moment_it_was_taken(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held back until two more steps are done: what it writes must not hold them."""
    original, steps = background._write, Trainer.step
    done = tmp_path / "step"
    done.write_text("0")

    def slow(staged: Any) -> None:
        began, until = int(done.read_text()), time.monotonic() + 60
        while int(done.read_text()) < min(began + 2, 6) and time.monotonic() < until:
            time.sleep(0.02)
        original(staged)

    def step(self: Trainer) -> Any:
        values = steps(self)
        assert not (self.root / f"iter_{self.position.iteration - 1:07d}").exists()  # still being written
        write_text_atomic(done, str(self.position.iteration))  # the reader must not find it half written
        return values

    plain, late = tmp_path / "plain", tmp_path / "late"
    flags = ["--save_safetensors", "true"]
    megatron_sft_main([*words, "--output_dir", str(plain), *flags])
    monkeypatch.setattr(background, "_write", slow)
    monkeypatch.setattr(Trainer, "step", step)
    megatron_sft_main([*words, "--output_dir", str(late), *flags, "--async_save", "true"])
    monkeypatch.undo()
    assert curve(plain) == curve(late)
    for iteration in ("iter_0000002", "iter_0000004", "iter_0000006"):
        assert main(["verify", str(plain / iteration), str(late / iteration)]) == 0
        for file in (plain / f"{iteration}-hf").iterdir():
            if file.name == "args.json":  # names its run's directory
                continue
            assert (late / f"{iteration}-hf" / file.name).read_bytes() == file.read_bytes()
    # The optimizer too: a run that resumes from the middle ends as the whole one did.
    (late / "latest_checkpointed_iteration.txt").write_text("2")
    (late / "logging.jsonl").unlink()
    megatron_sft_main([*words, "--output_dir", str(late), *flags, "--async_save", "true"])
    assert curve(late) == curve(plain)[2:]
    assert not list(late.glob(".*"))


def test_only_finished_checkpoints_count_for_the_limit(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save fails in the background: the first stays, is the one in use, and the run says so."""
    original, out = background._write, tmp_path / "out"

    def fail(staged: Any) -> None:
        if (out / "iter_0000002").exists():
            os._exit(1)
        original(staged)

    monkeypatch.setattr(background, "_write", fail)
    flags = ["--output_dir", str(out), "--async_save", "true", "--save_total_limit", "1"]
    with pytest.raises(CheckpointError, match="could not be written in the background"):
        megatron_sft_main([*words, *flags])
    assert [p.name for p in out.glob("iter_*")] == ["iter_0000002"]
    assert (out / "latest_checkpointed_iteration.txt").read_text() == "2"
    monkeypatch.undo()
    megatron_sft_main([*words, *flags])
    assert [p.name for p in out.glob("iter_*")] == ["iter_0000006"]


def test_a_snapshot_that_does_not_fit_is_written_at_once(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(background, "available_memory_bytes", lambda: 1000)
    monkeypatch.setattr(background.multiprocessing, "get_context", lambda _: pytest.fail("a process was started"))
    megatron_sft_main([*words, "--output_dir", str(tmp_path / "out"), "--async_save", "true", "--train_iters", "2"])
    assert (tmp_path / "out/iter_0000002").is_dir()
    assert "does not fit into half of the free memory" in capsys.readouterr().err


def test_one_snapshot_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackgroundWriter, "_agree", lambda self, value, op: value)  # one process, no group
    writer, order = BackgroundWriter(torch.device("cpu")), []

    def write(name: str) -> Write:
        def save() -> None:
            time.sleep(0.2)
            (tmp_path / name).touch()

        return Write(0, save, lambda: save, [lambda: order.append((name, (tmp_path / name).exists()))])

    writer.start([write("a"), write("b")], lambda: order.append(("first", True)))
    assert not order
    writer.finish()
    writer.start([write("c")], lambda: order.append(("second", True)))
    assert order == [("a", True), ("b", True), ("first", True)]
    writer.finish(wait=True)
    assert order[3:] == [("c", True), ("second", True)]


def test_the_last_directory_is_pushed_after_training(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(
        run, "push", lambda directory, model_id, **options: pushed.append((directory, model_id, options))
    )
    flags = ["--push_to_hub", "true", "--hub_model_id", "Org/Model", "--use_hf", "true", "--async_save", "true"]
    megatron_sft_main([*words, "--output_dir", str(tmp_path / "out"), "--train_iters", "2", *flags])
    ((directory, model_id, options),) = pushed
    assert directory == tmp_path / "out/iter_0000002-hf" and (directory / "model.safetensors").is_file()
    assert model_id == "Org/Model" and options == {"use_hf": True, "token": None, "private": False}
