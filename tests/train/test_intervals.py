"""When runs log, evaluate and save; which checkpoints stay; the trackers; the plot of several runs; SIGTERM."""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from swiftlite.arguments.train import SftArguments
from swiftlite.cli.main import main
from swiftlite.train.checkpoints import Record, finished
from swiftlite.train.intervals import Best, Intervals, names_of
from swiftlite.train.meters import METERS, StepMeter
from swiftlite.train.metrics import Metrics
from swiftlite.train.plot import plot_main, read_run, short_names
from swiftlite.train.stop import StopSignal
from swiftlite.utils.errors import CheckpointError, UsageError


def rhythm(total: int, per_epoch: float | None = 4.0, evaluates: bool = True, **values: Any) -> Intervals:
    return Intervals(SftArguments(model="DIR", **values), total, per_epoch, evaluates)


def steps(decides: Any, total: int) -> list[int]:
    return [step for step in range(1, total + 1) if decides(step)]


def test_steps_and_epochs() -> None:
    by_steps = rhythm(10, save_steps=4, eval_steps=3, logging_steps=5)
    assert steps(by_steps.logs, 10) == [1, 5, 10]
    assert steps(by_steps.evaluates, 10) == [3, 6, 9, 10]
    assert steps(by_steps.saves, 10) == [4, 8, 10]
    by_epoch = rhythm(10, per_epoch=2.5, save_strategy="epoch")
    assert steps(by_epoch.saves, 10) == steps(by_epoch.evaluates, 10) == [3, 5, 8, 10]
    assert steps(rhythm(10, save_strategy="no").saves, 10) == [10]
    assert steps(rhythm(10, evaluates=False, eval_steps=1).evaluates, 10) == []
    apart = rhythm(10, per_epoch=2.5, save_steps=4, eval_strategy="epoch")
    assert steps(apart.saves, 10) == [4, 8, 10] and steps(apart.evaluates, 10) == [3, 5, 8, 10]
    assert steps(rhythm(10, save_strategy="epoch", eval_strategy="steps", eval_steps=5).evaluates, 10) == [5, 10]
    assert steps(rhythm(10, eval_strategy="no", eval_steps=1).evaluates, 10) == []
    with pytest.raises(UsageError, match="--early_stop_interval: needs evaluations"):
        rhythm(10, eval_strategy="no", early_stop_interval=2)
    with pytest.raises(UsageError, match="a stream has no known epochs"):
        rhythm(10, per_epoch=None, save_strategy="epoch")


def test_best_checkpoint_is_kept(tmp_path: Path) -> None:
    best = Best(tmp_path, "loss")
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        assert best.saved(step, f"checkpoint-{step}", {"eval_loss": loss}) == (step < 3)
        assert best.is_over(2) == (step == 4) and not best.is_over(None)
    assert not best.saved(5, "checkpoint-5", {}), "nothing was evaluated"
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 2,
        "checkpoint": "checkpoint-2",
        "eval_loss": 1.0,
    }
    assert Best(tmp_path, "eval_loss").checkpoint == "checkpoint-2", "a resumed run remembers"
    assert best.describe() == "eval_loss 1" and Best(tmp_path, "eval_acc").describe() == "eval_acc"
    record = Record(tmp_path)
    for step in (1, 2, 3):
        record.saved([tmp_path / f"checkpoint-{step}"], None, None)
    deleted = record.saved([tmp_path / "checkpoint-4"], 2, best.checkpoint)
    assert sorted(path.name for path in deleted) == ["checkpoint-1", "checkpoint-3"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    kept = Record(tmp_path).saved([tmp_path / "checkpoint-4"], 1, best.checkpoint)
    assert kept == [], "neither the best nor the newest goes"
    with pytest.raises(UsageError, match="--metric_for_best_model bleu: is not measured; there are eval_loss"):
        Best(tmp_path, "bleu", measured=names_of(lambda sums: {"loss": sums["loss"]}))
    assert Best(tmp_path, "bleu").checkpoint == "checkpoint-2", "nothing is evaluated"
    up = Best(tmp_path / "new", "rewards/accuracies")
    assert up.greater and not Best(tmp_path, "nll_loss").greater and Best(tmp_path, "loss", True).greater


def test_only_what_a_run_recorded_is_deleted(tmp_path: Path) -> None:
    """Not the user's copies, whatever their numbers; in the order of saving, and never the highest step."""
    mine = [tmp_path / f"checkpoint-{step}" for step in (9, 10, 100)]
    for path in (*mine, *(tmp_path / f"checkpoint-{name}" for name in ("good-2", "2-2024", "3", "best"))):
        path.mkdir()
    for path in mine:
        Record(tmp_path).saved([path], 2, None)
    left = {
        "checkpoint-10",
        "checkpoint-100",
        "checkpoint-good-2",
        "checkpoint-2-2024",
        "checkpoint-3",
        "checkpoint-best",
    }
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert list(finished(tmp_path, "checkpoint-")) == [3, 10, 100]
    # The run was set back, and saves an earlier step.
    (tmp_path / "checkpoint-20").mkdir()
    Record(tmp_path).saved([tmp_path / "checkpoint-20"], 1, None)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left - {"checkpoint-10"} | {"checkpoint-20"}
    (tmp_path / "checkpoints.json").write_text("{")
    assert Record(tmp_path).saved([tmp_path / "checkpoint-20"], 1, None) == [], "nothing is known"


@pytest.mark.parametrize("name", ["../mine", "ABSOLUTE", "mine", ".", "", "checkpoint-1/../mine", 3, None, []])
def test_a_record_that_names_other_folders_deletes_nothing(name: Any, tmp_path: Path) -> None:
    """The file may have come with a run directory of somebody else."""
    run = tmp_path / "run"
    for path in (tmp_path / "mine", run / "mine", run / "checkpoint-1", run / "checkpoint-2"):
        path.mkdir(parents=True)
    entry = [str(tmp_path / "mine") if name == "ABSOLUTE" else name] if name != [] else []
    (run / "checkpoints.json").write_text(json.dumps({"saved": [["checkpoint-1"], entry]}))
    assert Record(run).saved([run / "checkpoint-2"], 1, None) == []
    assert (tmp_path / "mine").is_dir() and (run / "mine").is_dir()


def test_damaged_log_lines_are_dropped(tmp_path: Path) -> None:
    good = b'{"step": 1, "loss": 2.0}\n'
    for bad in (b"\xff\xfe\xff\n", b"null\n", b"[1]\n", b'{"step": 2, "lo', b'{"step": "x"}\n'):
        (tmp_path / "logging.jsonl").write_bytes(bad.rstrip() + b"\n" + good + bad)
        Metrics(tmp_path, None, [], 1, 2).close()
        assert (tmp_path / "logging.jsonl").read_bytes() == good


def test_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftlite.train import meters
    from swiftlite.train.flops import ModelFlops

    clock = iter([0.0, 2.0, 5.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(meters, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    meter = StepMeter(
        ModelFlops(linear=100, attention=10), devices=2, peak=1e12, memory=lambda: 3 * 2**30, references=1
    )
    step = {"tokens": 30.0, "padded_tokens": 40.0, "samples": 2.0, "pairs_attended": 7.0, "data_s": 0.5, "loss": 1.5}
    meter.add(step)  # 0 -> 2
    meter.restart_clock()  # at 5
    meter.add(step)  # -> 6
    assert meter.sum("loss") == 3.0
    values = meter.summary()
    done = 2 * (3 * (100 * 30 + 10 * 7) + 100 * 30 + 10 * 7)
    assert values == pytest.approx(
        {
            "tokens_per_second": 20, "padded_tokens_per_second": 80 / 3, "samples_per_second": 4 / 3,
            "tflops": done / 3 / 2 / 1e12, "mfu": done / 3 / 2 / 1e12, "step_s": 1.5, "data_s": 0.5,
            "padding_share": 0.25, "memory_gib": 3,
        }
    )  # fmt: skip
    assert set(values) <= set(METERS)
    meter.add({"tokens": 8.0})
    assert meter.summary()["tokens_per_second"] == 2, "each line begins anew"
    assert not {"tflops", "mfu"} & set(StepMeter(devices=1).summary())


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """wandb and swanlab as modules that note what they are told."""
    calls: list[Any] = []

    class Run:
        def log(self, values: Any, step: int) -> None:
            calls.append(("wandb", step, values))

        def finish(self) -> None:
            calls.append("wandb done")

    def wandb_init(**settings: Any) -> Run:
        calls.append(settings)
        return Run()

    wandb = types.SimpleNamespace(init=wandb_init)
    swanlab = types.SimpleNamespace(
        init=lambda **settings: calls.append(settings),
        log=lambda values, step: calls.append(("swanlab", step, values)),
        finish=lambda: calls.append("swanlab done"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    return calls


def test_trackers(trackers: list[Any], tmp_path: Path) -> None:
    settings = {"wandb_project": "p", "wandb_exp_name": None, "lr": 1.0, "hub_token": "secret"}
    metrics = Metrics(tmp_path, None, ["wandb", "swanlab"], 0, 2, settings=settings)
    metrics.log(1, {"loss": 2.0})
    metrics.close()
    wandb, swanlab = trackers[:2]
    assert wandb["project"] == swanlab["project"] == "p"
    assert wandb["name"] == swanlab["experiment_name"] == tmp_path.name
    assert wandb["config"] == {"wandb_project": "p", "wandb_exp_name": None, "lr": 1.0}, "no access tokens"
    assert trackers[2:] == [("wandb", 1, {"loss": 2.0}), ("swanlab", 1, {"loss": 2.0}), "wandb done", "swanlab done"]
    assert read_run(tmp_path / "logging.jsonl")[0]["loss"] == 2.0


def test_a_tracker_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(UsageError, match="--report_to swanlab: is not installed; pip install swanlab"):
        Metrics(tmp_path, None, ["swanlab"], 0, 2)


def test_plot_of_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    for name, shift in (("a", 0.0), ("b", 1.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": s, "loss": 3.0 / s + shift, "lr": 1e-4} for s in (1, 2, 3)] + [{"step": 3, "eval_loss": 1.5}]
        (tmp_path / name / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = plot_main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out/ab.png")])
    assert (tmp_path / "out/ab.png").read_bytes()[:4] == b"\x89PNG"
    assert result["runs"]["b"] == {"step": 3, "loss": 2.0, "lr": 1e-4, "eval_loss": 1.5}
    (tmp_path / "a/logging.jsonl").open("a").write('{"step": 4, "lo')
    assert len(read_run(str(tmp_path / "a"))) == 4, "a line that a kill cut off"
    (tmp_path / "a/logging.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(CheckpointError, match="line 1 is not JSON"):
        read_run(str(tmp_path / "a"))
    assert main(["plot", str(tmp_path)]) == 1
    assert "holds no logging.jsonl; name the --output_dir of a training run" in capsys.readouterr().err
    assert main(["plot"]) == 2
    assert short_names(["x/run", "y/run/", "z"]) == ["x/run", "y/run", "z"]


def test_sigterm_is_noted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_saves_once_and_ends_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second within two seconds is the first one again, as torchrun hands it on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.sent == signal.SIGINT
            monkeypatch.setattr("swiftlite.train.stop._IMPATIENT_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_nohup_is_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
