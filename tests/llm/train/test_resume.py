"""Resuming from a checkpoint that is damaged, incomplete or of other data: said, with the way on; one run at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.llm.train.begin import newest
from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.lock import output_lock
from tests.rows import preference_rows

ROWS = preference_rows(12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    (path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def run(root: Path, tiny_model: Callable[..., Path]) -> Callable[..., Any]:
    """run(output, flag=value...) -> the run's log lines."""

    def start(output: str, **flags: Any) -> list[dict[str, Any]]:
        settings = {
            "model": tiny_model("qwen3"), "model_type": "qwen3", "dataset": root / "data.jsonl",
            "output_dir": root / output, "torch_dtype": "float32", "global_batch_size": 2, "lr": 1e-3, "train_iters": 4,
            "logging_steps": 1, "save_steps": 2, "max_length": 200, "report_to": "none", **flags,
        }  # fmt: skip
        sft_main([word for name, value in settings.items() for word in (f"--{name}", str(value))])
        return read_run(root / output)

    return start


@pytest.fixture(scope="module")
def whole(run: Callable[..., Any]) -> list[dict[str, Any]]:
    return run("whole")


@pytest.fixture
def parts(whole: Any, root: Path) -> Path:
    """The same run, with whatever a test does to it."""
    shutil.rmtree(root / "parts", ignore_errors=True)
    shutil.copytree(root / "whole", root / "parts")
    return root / "parts"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
     "data_state.json", "args.json"],
)  # fmt: skip
def test_a_file_that_is_cut_off_is_named_and_the_checkpoint_before_offered(
    name: str, run: Callable[..., Any], parts: Path
) -> None:
    cut(parts / "checkpoint-4" / name)
    with pytest.raises(CheckpointError) as error:
        run("parts")
    assert str(parts / "checkpoint-4" / name) in str(error.value)
    assert f"remove {parts / 'checkpoint-4'} and give the same command again to resume from checkpoint-2" in str(
        error.value
    )


class Payload:
    """Makes the directory `ran` in the working directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin"])
def test_a_checkpoint_runs_no_code(
    name: str, run: Callable[..., Any], parts: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload is refused by the file's name; training_args.bin is nothing that a run reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # also where the environment asks for it
    shutil.rmtree(parts / "checkpoint-4")
    file = parts / "checkpoint-2" / name
    before = torch.load(file, weights_only=False) if file.is_file() else {}
    for content in (Payload(), {**before, "more": [Payload()]}):
        torch.save(content, file)
        if name == "training_args.bin":
            assert [line["loss"] for line in run("parts")] == [line["loss"] for line in whole]
            shutil.rmtree(parts / "checkpoint-4")
        else:
            with pytest.raises(CheckpointError) as error:
                run("parts")
            assert f"{file} refers to " in str(error.value) and "mkdir, which is code" in str(error.value)
            assert "begin anew" in str(error.value), "the way on"
        assert not (tmp_path / "ran").exists()


def test_what_is_advised_works(run: Callable[..., Any], parts: Path, whole: list[dict[str, Any]], syncs: Any) -> None:
    (parts / "checkpoint-4/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights .* are missing; copy it back, or remove"):
        run("parts")
    shutil.rmtree(parts / "checkpoint-4")
    assert [line["loss"] for line in run("parts")] == [line["loss"] for line in whole]
    assert syncs.unsynced(parts / "checkpoint-4") == []


@pytest.mark.parametrize("missing", [["optimizer.pt"], ["scheduler.pt"], ["optimizer.pt", "scheduler.pt"]])
def test_without_optimizer_or_schedule_the_rate_is_the_steps(
    missing: list[str], run: Callable[..., Any], parts: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(parts / "checkpoint-4")
    for name in missing:
        (parts / "checkpoint-2" / name).unlink()
    lines, said = run("parts"), capsys.readouterr().err
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole]
    assert ([line["loss"] for line in lines] == [line["loss"] for line in whole]) == ("optimizer.pt" not in missing)
    for name in missing:
        assert f"[WARNING] {parts / 'checkpoint-2' / name} is missing: " in said


def test_copies_of_the_user_are_no_checkpoints(parts: Path, run: Callable[..., Any]) -> None:
    for name in ("checkpoint-good-9", "checkpoint-2-2024", "checkpoint-best"):
        shutil.copytree(parts / "checkpoint-2", parts / name)
    start = newest(parts)
    assert start is not None and (start.step, start.before) == (4, parts / "checkpoint-2")
    shutil.copytree(parts / "checkpoint-2", parts / "checkpoint-99")
    with pytest.raises(CheckpointError, match=r"checkpoint-99/trainer_state.json is of step 2: a copy of another"):
        run("parts")


def test_other_data_is_told(parts: Path, run: Callable[..., Any], root: Path) -> None:
    shutil.rmtree(parts / "checkpoint-4")
    data = root / "data.jsonl"
    before = data.read_text()
    try:
        data.write_text(before.replace("Paris", "Milan", 1) if "Paris" in before else before.replace("1", "7"))
        with pytest.raises(UsageError, match="training data has changed since .*checkpoint-2 was saved"):
            run("parts")
    finally:
        data.write_text(before)


def test_a_second_run_in_the_same_directory_is_refused_and_harms_nothing(parts: Path, run: Callable[..., Any]) -> None:
    before = {path.name: path.read_bytes() for path in parts.iterdir() if path.is_file()}
    (parts / "rejects.jsonl").write_text("of the first run\n")
    with output_lock(parts):
        for _ in range(2):
            with pytest.raises(UsageError, match="another swiftlite process is writing"):
                run("parts")
    assert (parts / "rejects.jsonl").read_text() == "of the first run\n"
    assert {path.name: path.read_bytes() for path in parts.iterdir() if path.name in before} == before


def test_an_unknown_metric_is_told_before_training(run: Callable[..., Any], root: Path) -> None:
    with pytest.raises(UsageError, match="--metric_for_best_model bleu: is not measured; there are eval_loss"):
        run("metric", metric_for_best_model="bleu", split_dataset_ratio=0.25)
    assert not (root / "metric/checkpoint-2").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:664] file write failed"),
     ValueError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_full_disk_is_one_line(
    error: Exception, run: Callable[..., Any], parts: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever tells it; the checkpoint before is whole, and with room the run resumes from it."""

    def full(*_: Any) -> None:
        raise error

    shutil.rmtree(parts / "checkpoint-4")
    monkeypatch.setattr("swiftlite.train.loop.write_data_state", full)
    message = rf"{parts} cannot be written: the disk is full.* free in .*; make room, and the same command resumes"
    with pytest.raises(CheckpointError, match=message):
        run("parts")
    monkeypatch.undo()
    assert [line["loss"] for line in run("parts")] == [line["loss"] for line in whole]
    assert not (parts / ".saving").exists()
