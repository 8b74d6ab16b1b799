"""What a teacher said before training, on both sides: as the teacher itself where all tokens are kept, near it with few."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.cli.export import export_main
from swiftlite.llm import export_teacher
from swiftlite.llm.dataset.teacher import TeacherLogits
from swiftlite.llm.train.rlhf import rlhf_main
from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
from swiftlite.train.plot import read_run
from swiftlite.utils.errors import CheckpointError, DatasetError, UsageError
from tests.rows import preference_rows

ROWS, STEPS = 333, 20
SIDES = {"hf": rlhf_main, "mcore": megatron_rlhf_main}


class Setting:
    """A student, a teacher, data; commands that use them."""

    def __init__(self, root: Path, tiny_model: Callable[..., Path]) -> None:
        self.root = root
        self.models = [tiny_model("qwen3", seed=seed, vocab_size=ROWS, initializer_range=0.05) for seed in (0, 1)]
        self.data = root / "data.jsonl"
        rows = [{"messages": row["messages"]} for row in preference_rows(12)]
        rows[3]["messages"] = [*rows[3]["messages"], *rows[4]["messages"]]
        rows[5]["messages"][-1]["loss_scale"] = 0.5
        rows[6]["messages"] = [dict(message) for message in [*rows[6]["messages"], *rows[7]["messages"]]]
        rows[6]["messages"][1]["loss_scale"] = 0.0
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.common = {
            "model": self.models[0], "model_type": "qwen3", "template": "qwen3", "dataset": self.data, "max_length": 300,
            "torch_dtype": "float32", "temperature": 0.8,
        }  # fmt: skip

    def export(self, name: str, k: int, **flags: Any) -> Path:
        made = self.root / name
        settings = {
            **self.common, "to_teacher_logits": "true", "teacher_model": self.models[1], "teacher_topk": k,
            "output_dir": made, **flags,
        }  # fmt: skip
        return Path(export_main(words(settings)))

    def train(self, side: str, name: str, **flags: Any) -> list[dict[str, Any]]:
        settings = {
            **self.common, "rlhf_type": "gkd", "beta": 0.3, "output_dir": self.root / name / side, "global_batch_size": 4,
            "micro_batch_size": 2, "lr": 1e-3, "adam_eps": 1e-5, "train_iters": STEPS, "logging_steps": 1,
            "report_to": "none", "save_weights_only": "true", "sft_alpha": 0.2, "dataset_shuffle": "false", **flags,
        }  # fmt: skip
        SIDES[side](words(settings))
        return read_run(self.root / name / side / "logging.jsonl")


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Setting:
    return Setting(tmp_path_factory.mktemp("teacher"), tiny_model)


@pytest.fixture(scope="module")
def whole(setting: Setting) -> Path:
    return setting.export("whole", ROWS + 100)


@pytest.mark.parametrize("side", SIDES)
def test_all_tokens_are_the_teacher_itself(side: str, setting: Setting, whole: Path) -> None:
    """20 steps; samples of several turns and of other weights, evaluation too."""
    flags = {"split_dataset_ratio": 0.2, "eval_steps": 10}
    live = setting.train(side, "live", teacher_model=setting.models[1], **flags)
    known = setting.train(side, "known", teacher_logits=whole, **flags)
    assert sum("loss" in line for line in live) == STEPS and sum("eval_loss" in line for line in live) == 2
    for mine, wanted in zip(known, live, strict=True):
        for name in {"loss", "grad_norm", "nll_loss", "eval_loss", "eval_nll_loss"} & set(wanted):
            assert mine[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert live[0]["loss"] * 0.9 > live[-2]["loss"]


@pytest.fixture(scope="module")
def few(setting: Setting) -> Path:
    return setting.export("few", 16)


def test_few_tokens_teach(setting: Setting, few: Path) -> None:
    """Both sides, in micro batches, joined or packed: one curve; what is learnt is nearer to the teacher itself."""
    flags = {"teacher_logits": few, "global_batch_size": 12, "lr": 3e-3, "sft_alpha": 0, "lr_decay_style": "constant"}
    wanted = setting.train("hf", "few", **flags)
    for side, name, other in (
        ("mcore", "few", {}),
        ("mcore", "free", {"padding_free": "true", "micro_batch_size": 4}),
        ("hf", "free", {"padding_free": "true", "micro_batch_size": 4}),
        ("hf", "left", {"padding_side": "left"}),
        ("hf", "streamed", {"streaming": "true"}),
        ("mcore", "streamed", {"streaming": "true"}),
    ):
        found = setting.train(side, name, **flags, **other, train_iters=3)
        for line in ("loss", "grad_norm", "nll_loss"):
            mine, theirs = ([value[line] for value in lines if line in value] for lines in (found, wanted))
            assert mine == pytest.approx(theirs[: len(mine)], rel=1e-5), (side, name, line)
    live = {"teacher_model": setting.models[1], "global_batch_size": 12, "lr": 1e-9, "sft_alpha": 0, "train_iters": 1}
    before, after = (
        setting.train("hf", name, **live, model=model)[0]["loss"]
        for name, model in (("before", setting.models[0]), ("after", setting.root / "few/hf/checkpoint-20"))
    )
    assert wanted[0]["loss"] < before and after < 0.7 * before


@pytest.mark.parametrize("rows", [320, 350])
def test_another_number_of_rows(rows: int, setting: Setting, tiny_model: Callable[..., Path]) -> None:
    """Of the vocabulary, as models of one family have it: those that both have count, as with the teacher itself."""
    teacher = tiny_model("qwen3", seed=1, vocab_size=rows, initializer_range=0.05)
    known = setting.export(f"rows-{rows}", 1000, teacher_model=teacher)
    assert TeacherLogits(known).ids.shape[1] == rows
    live = setting.train("hf", f"live-{rows}", teacher_model=teacher, train_iters=3)
    for side in SIDES:
        found = setting.train(side, f"known-{rows}", teacher_logits=known, train_iters=3)
        for name in ("loss", "grad_norm"):
            assert [line[name] for line in found] == pytest.approx([line[name] for line in live], rel=1e-5), side


def test_half_precision(setting: Setting) -> None:
    """A bf16 teacher's log-probabilities are kept in float16: as near to it as its own logits are exact."""
    bf16 = {"torch_dtype": "bfloat16"}
    known = setting.export("half", 1000, **bf16)
    kept = TeacherLogits(known)
    assert kept.log_probs.dtype == torch.float16 and kept.rest.dtype == torch.float32
    assert (known / "log_probs.bin").stat().st_size == 2 * kept.ids.numel()
    for side in SIDES:
        flags = {"train_iters": 1, "sft_alpha": 0, **bf16}
        live = setting.train(side, "half-live", teacher_model=setting.models[1], **flags)
        found = setting.train(side, "half-known", teacher_logits=known, **flags)
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in live], rel=5e-3)


def test_packed(setting: Setting, few: Path) -> None:
    flags = {"teacher_logits": few, "packing": "true", "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 4}
    theirs, ours = (setting.train(side, "packed", **flags) for side in SIDES)
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], rel=1e-5)


def test_an_interrupted_export_goes_on(
    setting: Setting, few: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the last numbers were not written whole; another K begins anew."""
    asked: list[int] = []
    answers = export_teacher.Teacher.answers

    def stop(self: Any, samples: list[Any]) -> Any:
        asked.append(len(samples))
        if len(asked) == 3:
            raise KeyboardInterrupt
        yield from answers(self, samples)

    monkeypatch.setattr(export_teacher.Teacher, "answers", stop)
    monkeypatch.setattr(export_teacher, "batches_of", lambda places: ([part[i]] for part, i in places))
    with pytest.raises(KeyboardInterrupt):
        setting.export("again", 16)
    assert not (setting.root / "again").exists()
    beside = setting.root / ".again.partial"
    with (beside / "ids.bin").open("ab") as file:
        file.write(b"abc")
    (beside / "rest.bin").write_bytes((beside / "rest.bin").read_bytes()[:-1])
    made = setting.export("again", 16)
    assert "1 of 12 samples were answered before" in caplog.text and asked == [1] * (3 + 11)
    one, two = (TeacherLogits(directory) for directory in (made, few))
    assert len(one.ids) == len(two.ids) and one.ids.dtype == torch.int32 and one.rest.isfinite().all()
    assert not beside.exists() and json.loads((made / "args.json").read_text())["teacher_topk"] == 16
    del asked[:]
    with pytest.raises(UsageError, match="exists already"):
        setting.export("again", 8)
    with pytest.raises(KeyboardInterrupt):
        setting.export("again", 8, exist_ok="true")
    del asked[3:]
    assert TeacherLogits(setting.export("again", 7, exist_ok="true")).ids.shape == (len(one.ids), 7)
    assert asked == [1] * (3 + 12)


def test_what_cannot_be_used(setting: Setting, whole: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Another temperature, template, data or vocabulary; a damaged file; a flag of another job."""
    other = tmp_path / "other.jsonl"
    rows = [{"messages": row["messages"]} for row in preference_rows(14)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    with (damaged / "ids.bin").open("r+b") as file:
        file.write(b"abcd")
    empty = tmp_path / "empty"
    empty.mkdir()
    for flags, kind, said in (
        ({"temperature": 1}, UsageError, "was written with --temperature 0.8; use the same"),
        (
            {"system": "Be brief."},
            DatasetError,
            "no answer to 12 of 12 samples; it was written with default_system null",
        ),
        (
            {"dataset": other},
            DatasetError,
            "no answer to 2 of 6 samples; it was written with other data. Write it again",
        ),
        ({"teacher_logits": damaged}, DatasetError, "is not whole .its files have changed"),
        ({"teacher_logits": empty}, CheckpointError, "--teacher_logits .* holds neither a model"),
        ({"new_special_tokens": "<new>"}, UsageError, "has another vocabulary than --model"),
    ):
        for side in SIDES:
            with pytest.raises(kind, match=said):
                setting.train(side, "refused", **{"teacher_logits": whole, **flags})
    assert not (setting.root / "refused").exists() or not list((setting.root / "refused").rglob("checkpoint-*"))
    stream = {"streaming": "true", "dataset": other, "train_iters": 2}
    for side in SIDES:
        with pytest.raises(DatasetError, match="has no answer to a sample of .* tokens; write it with"):
            setting.train(side, "refused-stream", teacher_logits=whole, **stream)
    for flags, said in (
        ({"packing": "true"}, "sample by sample, and its answers serve packed training"),
        ({"template_mode": "rlhf"}, "trains on the samples of sft"),
        ({"to_cached_dataset": "true"}, "one at a time"),
        ({"dataset": None}, "give the data with --dataset"),
        ({"to_teacher_logits": None}, "goes with --to_teacher_logits true only"),
    ):
        with pytest.raises(UsageError, match=said):
            setting.export("refused", 4, **flags)
