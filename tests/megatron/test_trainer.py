"""`megatron sft` in one process: data order, batches, the files of a run, resumption rules, numbers against Hugging Face."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.megatron.model.blocks.attention import SdpaAttention
from swiftlite.megatron.trainers import run_directory
from swiftlite.megatron.trainers.batch import collate
from swiftlite.megatron.trainers.loss import language_model_loss
from swiftlite.megatron.trainers.sft import SftTrainer, megatron_sft_main
from swiftlite.train.batches import BatchPlan, evaluation_samples
from swiftlite.train.loop import Step
from swiftlite.train.order import SampleOrder
from swiftlite.train.plot import read_run
from swiftlite.utils.directories import read_tracker
from swiftlite.utils.errors import CheckpointError, DatasetError, SwiftliteError, UsageError
from swiftlite.utils.text import format_seconds

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i} plus {i}?"},
                  {"role": "assistant", "content": f"It is {2 * i}. " + "Paris is nice. " * (i % 3)}]}
    for i in range(10)
]  # fmt: skip


# ---- order and batches ----


def test_order_is_a_permutation_per_epoch_and_depends_on_the_position_only() -> None:
    order = SampleOrder(7, seed=3)
    first, second = order.slice(0, 7), order.slice(7, 14)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert SampleOrder(7, seed=3).slice(5, 12) == [*first[5:], *second[:5]]
    assert SampleOrder(7, seed=4).slice(0, 7) != first
    assert SampleOrder(7, seed=3, shuffle=False).slice(5, 9) == [5, 6, 0, 1]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 2), (2, 2), (2, 1), (4, 1)])
def test_ranks_share_a_global_batch_without_overlap(dp_size: int, micro: int) -> None:
    samples = list(range(8))
    parts = [BatchPlan(micro, 8 // (micro * dp_size), rank, dp_size).micro_batches(samples) for rank in range(dp_size)]
    assert all(len(part) == 8 // (micro * dp_size) and all(len(b) == micro for b in part) for part in parts)
    assert sorted(s for part in parts for batch in part for s in batch) == samples


def test_a_partial_last_batch_of_an_evaluation_is_filled_up() -> None:
    assert list(evaluation_samples(5, 4)) == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert list(evaluation_samples(5, 4, num_batches=1)) == [[0, 1, 2, 3]]


def test_collate_shifts_labels_and_pads_to_a_multiple() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9, 10, 11, 12], "labels": [-100, -100, 10, 11, 12], "loss_scale": [0, 0, 1.0, 2.0, 0.5]},
    ]
    batch = collate(rows, pad_token_id=3, multiple_of=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 3, 3, 3, 3, 3], [8, 9, 10, 11, 12, 3, 3, 3]]
    assert batch.labels.tolist() == [[6, 7, 0, 0, 0, 0, 0, 0], [0, 10, 11, 12, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 2, 0.5, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.num_tokens == 8


def test_loss_is_a_weighted_sum_and_counts_tokens() -> None:
    losses, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    total, count, report = language_model_loss(mask, losses)
    assert (total.item(), count.item()) == (4.0, 2)
    total /= 2  # as megatron-core's schedule does, in place
    assert {name: value.item() for name, value in report.items()} == {"loss": 4.0, "trained_tokens": 2}


def test_without_per_token_loss_the_logged_loss_is_the_mean_over_micro_batches() -> None:
    losses, masks = torch.tensor([[1.0, 2.0, 4.0]]), ([[0.0, 1.0, 0.5]], [[0.0, 0.0, 1.0]])
    reports = [language_model_loss(torch.tensor(mask), losses, per_token=False)[2] for mask in masks]
    sums = {name: sum(report[name].item() for report in reports) for name in SftTrainer.sums}
    trainer = SftTrainer.__new__(SftTrainer)  # no model is needed
    assert trainer.metrics(sums) == {"loss": (2.0 + 4.0) / 2}


def test_format_seconds() -> None:
    assert [format_seconds(s) for s in (5, 65, 3725)] == ["0:00:05", "0:01:05", "1:02:05"]


# ---- the output directory ----


def directory_args(tmp_path: Path, **changes: Any) -> Any:
    return MegatronSftArguments(
        **{"model": "DIR", "lr": 1e-4, "save_steps": 10, "output_dir": str(tmp_path), **changes}
    )


def test_output_directory_rules(tmp_path: Path) -> None:
    assert run_directory.prepare(directory_args(tmp_path / "new")) is None
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UsageError, match="holds no run"):
        run_directory.prepare(directory_args(tmp_path))
    (tmp_path / "args.json").write_text(json.dumps({"lr": 1e-4, "save_steps": 5}))
    assert run_directory.prepare(directory_args(tmp_path)) is None, "nothing was saved yet"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "iter_0000010").mkdir()
    start = run_directory.prepare(directory_args(tmp_path))
    assert start is not None and start.step == 10, "save settings may change"
    with pytest.raises(UsageError, match="other settings .lr 0.0001 -> 0.001"):
        run_directory.prepare(directory_args(tmp_path, lr=1e-3))
    with pytest.raises(UsageError, match="--resume is false"):
        run_directory.prepare(directory_args(tmp_path, resume=False))
    with pytest.raises(UsageError, match="is a file"):
        run_directory.prepare(directory_args(tmp_path, output_dir=str(tmp_path / "file.txt")))


@pytest.mark.parametrize(
    ("tracker", "step", "before", "said"),
    [
        (None, 20, 10, "is missing: resuming from the newest checkpoint, iter_0000020"),
        ("30", 20, 10, "says '30', which is not there: resuming from the newest checkpoint, iter_0000020"),
        ("\0\0", 20, 10, "which is not there"),
        ("10", 10, None, "says 10: resuming from there, although iter_0000020 is there, too"),
        ("20", 20, 10, ""),
    ],
)
def test_tracker_that_is_lost_or_set_back(
    tracker: str | None, step: int, before: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("iter_0000010", "iter_0000020", "iter_0000020-hf", "iter_good", "iter_30-mine"):
        (tmp_path / name).mkdir()
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    start = run_directory.newest(tmp_path)
    assert start is not None and start.step == step
    assert start.before == (tmp_path / f"iter_{before:07d}" if before else None)
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""


def test_versions_count_on(tmp_path: Path) -> None:
    assert Path(run_directory.versioned(str(tmp_path))).name.startswith("v0-")
    (tmp_path / "v3-20260101-000000").mkdir()
    assert Path(run_directory.versioned(str(tmp_path))).name.startswith("v4-")


# ---- whole runs ----


@pytest.fixture
def sft(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(output: str = "run", family: str = "qwen3", **flags: Any) -> dict[str, Any]:
        types = {"qwen3": "qwen3", "glm4_moe": "glm4_5"}
        settings = {
            "model": tiny_model(family, vocab_size=333), "model_type": types[family], "dataset": data,
            "output_dir": tmp_path / output, "torch_dtype": "float32", "micro_batch_size": 2, "global_batch_size": 4,
            "train_iters": 4, "lr": 1e-3, "logging_steps": 1, "save_steps": 2, **flags,
        }  # fmt: skip
        settings = {name: value for name, value in settings.items() if value is not None}
        return megatron_sft_main([word for name, value in settings.items() for word in (f"--{name}", str(value))])

    return run


def hf_loss(directory: Path, rows: list[dict[str, Any]]) -> float:
    """Mean loss per answer token of transformers' model over rows, encoded as the trainer encodes them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from swiftlite.llm.template.register import get_template

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    template = get_template("qwen3", AutoTokenizer.from_pretrained(directory))
    total, count = 0.0, 0
    for row in rows:
        encoded = template.encode(row)
        labels = torch.tensor(encoded["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([encoded["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def test_a_run_writes_what_it_says(
    sft: Callable[..., Any], tmp_path: Path, tiny_model: Callable[..., Path], syncs: Any, plots: None
) -> None:
    result = sft(split_dataset_ratio=0.3, eval_steps=2, save_safetensors="true", save_total_limit=1)
    root = tmp_path / "run"
    assert result["iteration"] == 4
    for name in ("args.json", "config.json", "tokenizer.json", "manifest.json", "megatron_lm_args.txt", "loss.png"):
        assert (root / name).stat().st_size > 0, name
    assert any((root / "runs").glob("events.out.tfevents*"))
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert [p.name for p in sorted(root.glob("iter_*"))] == ["iter_0000004", "iter_0000004-hf"]
    for name in ("iter_0000004", "iter_0000004-hf", "config.json", "tokenizer.json"):
        assert syncs.unsynced(root / name) == [], name
    history = read_run(root / "logging.jsonl")
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4]
    losses = [line["loss"] for line in history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(line["tokens_per_second"] > 0 and 0 <= line["padding_share"] < 1 for line in history if "loss" in line)
    # Evaluation: 3 rows in batches of 4, none of them counted twice or left out.
    from swiftlite.llm.dataset import load_dataset

    _, held_out = load_dataset(str(tmp_path / "data.jsonl"), split_dataset_ratio=0.3)
    evaluations = [line for line in history if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert evaluations[-1]["eval_loss"] == pytest.approx(hf_loss(root / "iter_0000004-hf", held_out), rel=1e-5)


def test_common_file_is_plain(sft: Callable[..., Any], tmp_path: Path) -> None:
    sft(train_iters=2)
    common = torch.load(tmp_path / "run" / "iter_0000002" / "common.pt", weights_only=True)
    assert (common["iteration"], common["checkpoint_version"]) == (2, 3.0)
    assert (common["args"].num_layers, common["args"].consumed_train_samples) == (2, 8)
    from torch.distributed.checkpoint import FileSystemReader

    tensors = FileSystemReader(tmp_path / "run" / "iter_0000002").read_metadata().state_dict_metadata
    assert tuple(tensors["embedding.word_embeddings.weight"].size) == (333, 64)
    assert tuple(tensors["optimizer.state.exp_avg.embedding.word_embeddings.weight"].size) == (333, 64)
    assert not any("_extra_state" in name for name in tensors)


def test_first_loss_is_that_of_the_hugging_face_model(sft: Callable[..., Any], tmp_path: Path,
                                                      tiny_model: Callable[..., Path]) -> None:  # fmt: skip
    sft(global_batch_size=10, train_iters=1)
    first = read_run(tmp_path / "run" / "logging.jsonl")[0]["loss"]
    assert first == pytest.approx(hf_loss(tiny_model("qwen3", vocab_size=333), ROWS), rel=1e-5)


def test_the_same_command_goes_on_and_a_finished_run_has_nothing_to_do(sft: Callable[..., Any], tmp_path: Path) -> None:
    sft("whole", train_iters=4)
    sft("stopped", train_iters=4)
    root = tmp_path / "stopped"
    (root / "latest_checkpointed_iteration.txt").write_text("2")  # as if it had been killed in step 3
    assert sft("stopped", train_iters=4)["iteration"] == 4
    curves = [
        [(line["loss"], line["grad_norm"]) for line in read_run(tmp_path / name / "logging.jsonl")]
        for name in ("whole", "stopped")
    ]
    assert curves[0] == curves[1]
    assert sft("stopped", train_iters=4)["iteration"] == 4
    with pytest.raises(UsageError, match="other settings"):
        sft("stopped", train_iters=4, lr=2e-3)
    first = tmp_path / "whole/iter_0000002"
    assert sft("other", train_iters=4, resume_from_checkpoint=first)["iteration"] == 4
    assert sft("stopped", train_iters=4, resume_from_checkpoint=root / "iter_0000002")["iteration"] == 4
    for name in ("other", "stopped"):
        lines = read_run(tmp_path / name / "logging.jsonl")
        assert [(line["loss"], line["grad_norm"]) for line in lines][-2:] == curves[0][2:]
        assert read_tracker(tmp_path / name)[0] == "4"


class Payload:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(
    sft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sft()
    last = tmp_path / "run/iter_0000004"
    whole = {path.name: path.read_bytes() for path in last.iterdir()}
    tensors = next(name for name in whole if name.endswith(".distcp"))
    for name, left in ((tensors, 2), (tensors, None), ("common.pt", 2), ("common.pt", None), (".metadata", 2)):
        (last / name).write_bytes(whole[name][: len(whole[name]) // left]) if left else (last / name).unlink()
        with pytest.raises(CheckpointError) as error:
            sft()
        assert str(last) in str(error.value) and name in str(error.value)
        assert f"remove {last} and give the same command again to resume from iter_0000002" in str(error.value)
        (last / name).write_bytes(whole[name])
    # A random generator's state that is code, at the end of a file.
    with (last / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    index = next(index for index in metadata.storage_data if index.fqn.startswith("rng_state"))
    payload = io.BytesIO()
    torch.save(Payload(), payload)
    info = metadata.storage_data[index]
    with (last / info.relative_path).open("ab") as file:
        changed = replace(info, offset=file.tell(), length=file.write(payload.getvalue()))
    metadata.storage_data[index] = changed
    (last / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=rf"{last / info.relative_path} refers to .*mkdir, which is code.*copy it"
    ):
        sft()
    assert not (tmp_path / "ran").exists()
    data = tmp_path / "data.jsonl"
    rows = data.read_text()
    (last / ".metadata").write_bytes(whole[".metadata"])
    data.write_text(rows.replace("Paris is nice", "Milan is nice", 1))
    with pytest.raises(UsageError, match="training data has changed since .*iter_0000004 was saved"):
        sft()
    data.write_text(rows)
    shutil.rmtree(last)
    assert sft()["iteration"] == 4 and last.is_dir(), "what was advised works"


def test_sigterm_saves_and_ends(sft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft("whole")
    usual = SftTrainer.step

    def step(self: SftTrainer) -> Step:
        if self.position.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(self)

    monkeypatch.setattr(SftTrainer, "step", step)
    stopped = sft("parts", save_steps=100)
    assert (stopped["iteration"], stopped["signal"]) == (3, signal.SIGTERM)
    assert (tmp_path / "parts/latest_checkpointed_iteration.txt").read_text() == "3"
    assert sft("parts", save_steps=100)["iteration"] == 4
    whole, parts = (read_run(tmp_path / name / "logging.jsonl") for name in ("whole", "parts"))
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


def test_best_limit_and_early_stopping(
    sft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the best evaluation stays next to the newest; what a kill left behind does not count."""
    monkeypatch.setattr(SftTrainer, "evaluate", lambda self: {"eval_loss": float(self.position.iteration)})
    (tmp_path / "run/.iter_0000003.saving").mkdir(parents=True)
    (tmp_path / "run/args.json").write_text('{"lr": 0.001}')
    sft(split_dataset_ratio=0.3, save_steps=1, eval_steps=1, save_total_limit=2)
    assert {path.name for path in (tmp_path / "run").glob("iter_*")} == {"iter_0000001", "iter_0000004"}
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] == 1
    # Steps 2 and 3 are no better than step 1: the run ends, after the step in hand, as one that is done.
    stopped = sft("early", split_dataset_ratio=0.3, save_steps=1, eval_steps=1, early_stop_interval=2, train_iters=8)
    assert (stopped["iteration"], stopped["signal"]) == (4, None)
    assert (tmp_path / "early/latest_checkpointed_iteration.txt").read_text() == "4"


def test_epochs_are_when_checkpoints_are_written(sft: Callable[..., Any], tmp_path: Path) -> None:
    """10 rows in batches of 4: the passes end in steps 3, 5 and 8."""
    sft(train_iters=None, num_train_epochs=3, save_strategy="epoch", save_weights_only="true", split_dataset_ratio=0)
    assert sorted(path.name[-2:] for path in (tmp_path / "run").glob("iter_*")) == ["03", "05", "08"]


def test_recomputing_changes_no_number(
    sft: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole layers run twice with `full`; torch's attention keeps no scores, so `selective` leaves it alone."""
    ran = {MLP: 0, SdpaAttention: 0}

    def counting(cls: Any, forward: Any) -> Any:
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            ran[cls] += 1
            return forward(self, *args, **kwargs)

        return counted

    for cls in ran:
        monkeypatch.setattr(cls, "forward", counting(cls, cls.forward))
    passes = 2 * 2 * 2  # layers, micro batches, steps
    curves = {}
    for way, expected, flags in (
        ("none", (1, 1), {}), ("selective", (1, 1), {}), ("full", (2, 2), {}),
        ("mlp", (2, 1), {"recompute": "selective", "recompute_modules": "mlp"}),
    ):  # fmt: skip
        ran.update({MLP: 0, SdpaAttention: 0})
        sft(way, train_iters=2, **{"recompute": way, **flags})
        assert tuple(ran.values()) == tuple(passes * times for times in expected), way
        curves[way] = [(line["loss"], line["grad_norm"]) for line in read_run(tmp_path / way / "logging.jsonl")]
    for way, curve in curves.items():
        assert curve == [pytest.approx(values, rel=1e-6) for values in curves["none"]], way


def test_weights_only_checkpoints_go_on_without_optimizer(sft: Callable[..., Any], tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    sft(train_iters=4, save_weights_only="true")
    names = FileSystemReader(tmp_path / "run" / "iter_0000002").read_metadata().state_dict_metadata
    assert not any(name.startswith("optimizer.") or name.startswith("rng_state") for name in names)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2")
    before = read_run(tmp_path / "run" / "logging.jsonl")
    sft(train_iters=4, save_weights_only="true")
    again = read_run(tmp_path / "run" / "logging.jsonl")
    assert again[2]["loss"] == pytest.approx(before[2]["loss"], rel=1e-6), "the weights are those of step 2"
    assert [line["lr"] for line in again] == [line["lr"] for line in before], "the schedule continues"


def test_bf16_start_is_exact(sft: Callable[..., Any], tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A step with learning rate 0 leaves every weight as it was loaded, also fp32 router biases in a bf16 model."""
    from safetensors.torch import load_file

    sft("run", "glm4_moe", lr=0, weight_decay=0, torch_dtype="bfloat16", train_iters=2, save_safetensors="true",
        global_batch_size=10, dataset_shuffle="false")  # fmt: skip
    losses = [line["loss"] for line in read_run(tmp_path / "run" / "logging.jsonl")]
    assert losses[0] == losses[1]
    before = load_file(tiny_model("glm4_moe", vocab_size=333) / "model.safetensors")
    (shard,) = (tmp_path / "run" / "iter_0000002-hf").glob("*.safetensors")
    after = load_file(shard)
    assert set(before) == set(after)
    for name, tensor in before.items():
        keeps = name.endswith("e_score_correction_bias")
        assert after[name].dtype == (torch.float32 if keeps else torch.bfloat16)
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name


def test_training_from_a_converted_checkpoint_equals_training_from_hugging_face(
    sft: Callable[..., Any], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    from swiftlite.arguments.export import ExportArguments
    from swiftlite.cli.export import convert_hf2mcore

    source = tiny_model("qwen3", vocab_size=333)
    convert_hf2mcore(
        ExportArguments(model=str(source), model_type="qwen3", to_mcore=True, output_dir=str(tmp_path / "mcore"))
    )
    sft("from-hf")
    sft("from-mcore", model=None, model_type=None, mcore_model=tmp_path / "mcore")
    one, two = ([line["loss"] for line in read_run(tmp_path / n / "logging.jsonl")] for n in ("from-hf", "from-mcore"))
    assert one == two


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        ({"dataset": None}, UsageError, "--dataset"),
        ({"global_batch_size": 3}, UsageError, "multiple of --micro_batch_size"),
        ({"lr_warmup_iters": 9}, UsageError, "9 warm-up steps"),
        ({"num_virtual_stages_per_pipeline_rank": 2}, UsageError, "--pipeline_model_parallel_size"),
        ({"mcore_model": "HF", "model": None, "model_type": None}, CheckpointError, "give it with --model"),
        ({"max_length": 4}, DatasetError, "longer than --max_length"),
        ({"lr": 1e30, "clip_grad": 0, "train_iters": 4}, SwiftliteError, "diverged"),
    ],
)
def test_user_errors(
    flags: dict[str, Any], error: type[Exception], words: str, sft: Callable[..., Any], tmp_path: Path,
    tiny_model: Callable[..., Path],
) -> None:  # fmt: skip
    flags = {k: tiny_model("qwen3", vocab_size=333) if v == "HF" else v for k, v in flags.items()}
    with pytest.raises(error, match=words):
        sft(**flags)
    assert not torch.distributed.is_initialized()
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


def test_a_run_leaves_neither_weights_nor_process_groups(sft: Callable[..., Any]) -> None:
    """Each group has threads that wake up a hundred times a second; a process that trains often would drown in them."""

    def threads() -> int:
        gc.collect()
        return len(list(Path("/proc/self/task").iterdir()))

    sft("first")
    before = threads()
    sft("second")
    assert threads() == before
