"""`--skip_train true`: the losses of a data set as training's evaluations tell them, without training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import parse
from swiftlite.cli.evaluate import eval_main
from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.selftest.shrink import write_random_model
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import UsageError
from tests.rows import preference_rows


@pytest.fixture
def words(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    rows = [{**row, "channel": "ab"[i % 2]} for i, row in enumerate(preference_rows(11))]
    for name, part in (("train", rows[:8]), ("val", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    common = {"model_type": "qwen3", "torch_dtype": "float32", "global_batch_size": 2, "report_to": "none"}

    def make(**flags: Any) -> list[str]:
        settings = {"model": tiny_model("qwen3"), "val_dataset": tmp_path / "val.jsonl", **common, **flags}
        return [word for name, value in settings.items() for word in (f"--{name}", str(value))]

    return make


def evaluations(run: Path) -> list[dict[str, float]]:
    lines = read_run(run / "logging.jsonl")
    return [{n: v for n, v in line.items() if n.startswith("eval_")} for line in lines if "eval_loss" in line]


@pytest.mark.parametrize(
    ("main", "more"),
    [(megatron_sft_main, {"enable_channel_loss": "true"}), (megatron_sft_main, {"train_type": "lora", "lora_dropout": 0}),
     (megatron_rlhf_main, {"ref_model": "none", "rlhf_type": "dpo"})],
    ids=["channels", "adapters", "preferences"],
)  # fmt: skip
def test_the_numbers_are_those_of_the_run(
    main: Any, more: dict[str, Any], words: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step, and of what two steps made, in Megatron's format."""
    run = tmp_path / "run"
    data = {"dataset": tmp_path / "train.jsonl", "output_dir": run, "train_iters": 2, "eval_steps": 1, "save_steps": 2}
    main(words(**data, **more, lr=1e-2))
    after = evaluations(run)[-1]
    before_files = sorted(run.rglob("*"))
    capsys.readouterr()
    model = {"mcore_adapter" if "train_type" in more else "mcore_model": run / "iter_0000002"}
    if main is megatron_rlhf_main:
        more = {**more, "ref_model": words()[1]}
    found = main(words(**model, **more, skip_train="true", output_dir=tmp_path / "none"))
    assert found == pytest.approx(after, rel=1e-6)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert sorted(run.rglob("*")) == before_files and not (tmp_path / "none").exists()
    start = main(words(**more, skip_train="true"))
    assert abs(start["eval_loss"] - after["eval_loss"]) > 1e-3


def test_both_sides_tell_one_loss(words: Callable[..., list[str]], tmp_path: Path) -> None:
    found = megatron_sft_main(words(skip_train="true", enable_channel_loss="true"))
    model = words()[1]
    told = eval_main(["--model", model, "--model_type", "qwen3", "--val_dataset", str(tmp_path / "val.jsonl"),
                      "--torch_dtype", "float32"])["models"][0]["results"]  # fmt: skip
    theirs = next(iter(told.values()))
    assert found == pytest.approx({f"eval_{name}": theirs[name] for name in ("loss", "loss_a", "loss_b")}, rel=1e-5)


def test_what_only_checkpoints_need_is_left_alone(
    words: Callable[..., list[str]], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """MTP blocks that are not trained: a run keeps them in a file for its checkpoints."""
    tiny, model = tiny_model("glm4_moe"), tmp_path / "mtp"
    config = json.loads((tiny / "config.json").read_text())
    write_random_model({**config, "num_nextn_predict_layers": 1}, model)
    for file in tiny.iterdir():
        if not (model / file.name).exists():
            shutil.copy(file, model)
    flags = {"model": model, "model_type": "glm4_5", "template": "qwen3", "output_dir": tmp_path / "none"}
    assert megatron_sft_main(words(**flags, skip_train="true"))["eval_loss"] > 0
    assert not (tmp_path / "none").exists()


def test_it_evaluates_alone() -> None:
    with pytest.raises(UsageError, match="give the data with --val_dataset"):
        parse(MegatronSftArguments, ["--model", "DIR", "--skip_train", "true"])
    with pytest.raises(UsageError, match="give --ref_model, what the model began with"):
        parse(MegatronDpoArguments, ["--mcore_model", "DIR", "--skip_train", "true", "--val_dataset", "V"])
    with pytest.raises(UsageError, match="leave out --dataset"):
        parse(MegatronSftArguments, ["--model", "D", "--skip_train", "true", "--dataset", "F", "--val_dataset", "V"])
