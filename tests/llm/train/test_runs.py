"""Whole runs of `swiftlite sft`, `pt` and `dpo` on tiny models: what they compute, write, keep and resume from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import parse
from swiftlite.arguments.train import SftArguments
from swiftlite.cli import main as cli
from swiftlite.llm.dataset.pairs import PairDataset, sequences_of
from swiftlite.llm.infer import validation_data
from swiftlite.llm.train import saving
from swiftlite.llm.train.dpo import dpo_main
from swiftlite.llm.train.optimization import Optimization
from swiftlite.llm.train.sft import pt_main, sft_main
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.meters import METERS
from swiftlite.train.objective import LanguageModeling
from swiftlite.train.plot import read_run
from swiftlite.train.plugins import by_probability
from swiftlite.utils.errors import DatasetError, SwiftliteError, UsageError
from tests.rows import preference_rows

ROWS = preference_rows(12)


@pytest.fixture
def run(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """run(main, output, flag=value...) on ROWS -> (result, lines of logging.jsonl)."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def start(
        main: Any, output: str, family: str = "qwen3", **flags: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        settings = {
            "model": tiny_model(family), "model_type": {"qwen3": "qwen3", "glm4_moe": "glm4_5"}[family],
            "template": "qwen3", "dataset": data, "output_dir": tmp_path / output, "torch_dtype": "float32",
            "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "train_iters": 4, "logging_steps": 1,
            "max_length": 200, "report_to": "none", "lora_dropout": 0, **flags,
        }  # fmt: skip
        words = [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
        return main(words), read_run(tmp_path / output / "logging.jsonl")

    return start


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_meters_have_their_names(run: Any) -> None:
    _, lines = run(sft_main, "run", split_dataset_ratio=0.25, eval_steps=2)
    names = {name for line in lines for name in line} - {"step", "total_steps"}
    assert names == set(METERS) - {"mfu", "loss_scale", "skipped_steps", "nll_loss", "kl"} - {
        name for name in METERS if "/" in name
    }
    assert all(line["tokens_per_second"] <= line["padded_tokens_per_second"] for line in lines if "loss" in line)


def test_accumulation_does_not_change_the_loss(run: Any) -> None:
    """A mean over the global batch's tokens, however it is divided; joined samples too."""
    wanted = [(line["loss"], line["grad_norm"]) for line in run(sft_main, "a", micro_batch_size=4)[1]]
    for output, flags in (
        ("b", {"micro_batch_size": 1}),
        ("c", {"padding_free": "true"}),
        ("d", {"recompute": "full"}),
        ("e", {"micro_batch_size": None, "gradient_accumulation_steps": 2}),
    ):
        found = [(line["loss"], line["grad_norm"]) for line in run(sft_main, output, **flags)[1]]
        for one, two in zip(wanted, found, strict=True):
            assert two == pytest.approx(one, rel=1e-5), output
    assert wanted[-1][0] < 0.8 * wanted[0][0]


def test_log_lines_weigh_steps_by_tokens(run: Any) -> None:
    single = losses(run(sft_main, "a")[1])
    pairs = run(sft_main, "b", logging_steps=4)[1]
    assert [line["step"] for line in pairs] == [1, 4]
    assert min(single[1:]) < pairs[1]["loss"] < max(single[1:])


def test_bf16_goes_on_exactly(run: Any, tmp_path: Path) -> None:
    """Trained weights are fp32 between steps and after a restart; the checkpoint itself is bf16."""
    flags = {"torch_dtype": "bfloat16", "save_steps": 2, "lr": 1e-4}
    _, whole = run(sft_main, "whole", **flags)
    run(sft_main, "parts", **flags)
    shutil.rmtree(tmp_path / "parts/checkpoint-4")
    _, parts = run(sft_main, "parts", **flags)
    assert losses(parts) == losses(whole)
    assert {t.dtype for t in load_file(tmp_path / "whole/checkpoint-2/model.safetensors").values()} == {torch.bfloat16}
    kept = load_file(tmp_path / "whole/checkpoint-2/fp32_parameters.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}
    # Control: without them the curve is another.
    shutil.rmtree(tmp_path / "parts/checkpoint-4")
    (tmp_path / "parts/checkpoint-2/fp32_parameters.safetensors").unlink()
    assert losses(run(sft_main, "parts", **flags)[1]) != losses(whole)


def test_experts_go_on_where_they_were(run: Any, tmp_path: Path) -> None:
    """Checkpoints name each expert, the model in memory may hold all of a layer in one tensor."""
    common = {"family": "glm4_moe", "save_steps": 2, "lr": 1e-2}
    some = {"trainable_parameters_regex": r"experts\.[12]\.", "train_type": "freeze"}
    for output, flags in (("full", common), ("freeze", {**common, **some})):
        _, whole = run(sft_main, output, **flags)
        shutil.rmtree(tmp_path / output / "checkpoint-4")
        _, parts = run(sft_main, output, **flags)
        assert losses(parts)[2:] == losses(whole)[2:] and losses(whole)[3] < losses(whole)[2], output
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in load_file(tmp_path / "full/checkpoint-2/model.safetensors")


def test_a_run_in_bf16_leaves_nothing_to_the_next(run: Any) -> None:
    before = losses(run(sft_main, "before")[1])
    run(sft_main, "half", torch_dtype="bfloat16", train_iters=1)
    assert losses(run(sft_main, "after")[1]) == before


def test_checkpoint_has_the_models_own_files(run: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    run(sft_main, "run", train_iters=1)
    written, source = tmp_path / "run/checkpoint-1", tiny_model("qwen3")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    assert set(load_file(written / "model.safetensors")) == set(load_file(source / "model.safetensors"))
    assert json.loads((written / "args.json").read_text())["train_iters"] == 1
    assert not (tmp_path / "run/.saving").exists()


def test_best_and_limit(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The checkpoint of the best evaluation stays next to the newest ones."""
    evaluate = HfTrainer.evaluate

    def worse_each_time(self: HfTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**evaluate(self, *args, **kwargs), "eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(HfTrainer, "evaluate", worse_each_time)
    run(sft_main, "run", split_dataset_ratio=0.25, save_steps=1, eval_steps=1, save_total_limit=2)
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    assert json.loads((tmp_path / "run/best.json").read_text())["step"] == 1
    assert "best so far: checkpoint-1, eval_loss 1\n" in caplog.text
    assert f"best checkpoint: {tmp_path / 'run/checkpoint-1'}, eval_loss 1\n" in caplog.text


def test_evaluation_counts_every_sample(run: Any, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """Three samples in batches of two: the loss is the mean over all their tokens."""
    held_out = tmp_path / "val.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    _, two = run(sft_main, "a", val_dataset=held_out, train_iters=1, lr=0)
    _, three = run(sft_main, "b", val_dataset=held_out, train_iters=1, lr=0, micro_batch_size=4)
    _, trained = run(sft_main, "c", dataset=held_out, train_iters=1, global_batch_size=3, micro_batch_size=3)
    assert two[-1]["eval_loss"] == pytest.approx(three[-1]["eval_loss"], rel=1e-6)
    assert two[-1]["eval_loss"] == pytest.approx(trained[0]["loss"], rel=1e-6)


def test_sigterm_saves_and_ends(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = run(sft_main, "whole")
    end_step, steps = HfTrainer.end_step, 0

    def send(self: HfTrainer, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return end_step(self, *args)

    monkeypatch.setattr(HfTrainer, "end_step", send)
    result, _ = run(sft_main, "parts")
    assert result["signal"] == signal.SIGTERM
    assert result["iteration"] == 2 and (tmp_path / "parts/checkpoint-2/trainer_state.json").is_file()
    result, parts = run(sft_main, "parts")
    assert result["iteration"] == 4
    assert losses(parts) == losses(whole)


def test_a_killed_save_leaves_the_one_before(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(source: Path, target: Path) -> None:
        if target.name == "checkpoint-4":
            raise Killed
        replace(source, target)

    replace = saving.replace_directory
    monkeypatch.setattr(saving, "replace_directory", die)
    with pytest.raises(Killed):
        run(sft_main, "run", save_steps=2)
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}
    monkeypatch.setattr(saving, "replace_directory", replace)
    result, lines = run(sft_main, "run", save_steps=2)
    assert result["iteration"] == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.faults
@pytest.mark.parametrize("place", ["save", "replace_directory"])
def test_kill_9_in_a_save(
    place: str, run: Any, tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, between the files of the second checkpoint, or before it gets its name."""
    owner = Optimization if place == "save" else saving
    original, calls = getattr(owner, place), 0

    def die(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, place, die)
    tiny_model("qwen3")  # made by this process, for both
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the others are not there after a fork
        run(sft_main, "run", save_steps=2)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    monkeypatch.setattr(owner, place, original)
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}
    result, lines = run(sft_main, "run", save_steps=2)
    assert result["iteration"] == 4 and [line["step"] for line in lines] == [1, 2, 3, 4]
    assert losses(lines) == pytest.approx(losses(run(sft_main, "whole")[1]), rel=1e-6)
    assert {p.name for p in (tmp_path / "run").glob("*checkpoint*") if p.is_dir()} == {"checkpoint-2", "checkpoint-4"}
    assert not (tmp_path / "run/.saving").exists()


def test_a_finished_run_is_extended(run: Any, tmp_path: Path) -> None:
    """With the schedule of the new length, from the last checkpoint; without --extend it is another run."""
    settings = {"lr_decay_style": "linear", "neftune_noise_alpha": 5}
    _, first = run(sft_main, "out", train_iters=2, **settings)
    with pytest.raises(UsageError, match="train_iters 2 -> 4.*--extend true"):
        run(sft_main, "out", train_iters=4, **settings)
    result, lines = run(sft_main, "out", train_iters=4, extend=True, **settings)
    assert result["iteration"] == 4 and len(losses(lines)) == 4
    assert [line["lr"] for line in lines][2:] == pytest.approx([1e-3 * 2 / 4, 1e-3 * 1 / 4])
    with pytest.raises(UsageError, match="holds a run with other settings .lr "):
        run(sft_main, "out", train_iters=6, extend=True, lr=2e-3, **settings)
    _, quiet = run(sft_main, "quiet", train_iters=2, lr_decay_style="linear")
    assert losses(quiet) != losses(first)[:2], "noise on the embeddings"


def test_a_named_checkpoint_is_where_a_run_resumes(run: Any, tmp_path: Path) -> None:
    """In the same directory, and in another, which the same command then resumes; of the same run only."""
    flags = {"train_iters": 6, "save_steps": 2}
    _, whole = run(sft_main, "whole", **flags)
    for output, step in (("whole", 4), ("other", 2)):
        result, lines = run(sft_main, output, resume_from_checkpoint=tmp_path / f"whole/checkpoint-{step}", **flags)
        assert losses(lines) == losses(whole)[6 - len(losses(lines)) :] and result["seconds"] and result["loss"]
        assert len(losses(lines)) == (6 if output == "whole" else 4)
    shutil.rmtree(tmp_path / "other/checkpoint-6")
    shutil.rmtree(tmp_path / "whole/checkpoint-4")
    named = {"resume_from_checkpoint": tmp_path / "whole"}
    _, lines = run(sft_main, "other", **flags, **named)
    assert losses(lines) == losses(whole)[2:], "from its own newest"
    for output, settings, message in (
        (
            "new",
            {"resume_from_checkpoint": tmp_path / "whole/checkpoint-4"},
            "no such checkpoint; there are checkpoint-2,",
        ),
        (
            "new",
            {**named, "lr": 2e-3},
            "--resume_from_checkpoint .*: holds a run with other settings .lr 0.001 -> 0.002",
        ),
        ("whole", {**named, "resume": "false"}, "--resume false and --resume_from_checkpoint: give one of them"),
        ("new", {"resume_from_checkpoint": tmp_path}, "no such checkpoint; there are none in"),
    ):
        with pytest.raises(UsageError, match=message):
            run(sft_main, output, **{**flags, **settings})
    assert not (tmp_path / "new").exists()


def test_probable_tokens_count_more_with_dft(run: Any) -> None:
    """arXiv 2508.05629: -p log p with p held; an evaluation is the cross entropy."""
    flags = {"train_iters": 1, "split_dataset_ratio": 0.4, "eval_steps": 1}
    plain, weighted = (run(sft_main, name, enable_dft_loss=name, **flags)[1] for name in ("false", "true"))
    assert 0 < losses(weighted)[0] < 0.1 * losses(plain)[0], "a model that knows nothing gives each token 1 / V"
    logits = torch.randn(1, 5, 7, requires_grad=True)
    labels = torch.tensor([[-100, 1, 2, -100, 3]])
    model = torch.nn.Module()
    model.forward = lambda **_: types.SimpleNamespace(logits=logits)  # type: ignore[method-assign]
    objective = LanguageModeling(by_probability)
    batch = {"labels": labels, "input_ids": labels}
    found = objective.sums(model, batch)["loss"]
    chosen = logits[0, :-1].log_softmax(-1)[[0, 1, 3], [1, 2, 3]]
    torch.testing.assert_close(found, -(chosen.exp() * chosen).sum())
    (gradient,) = torch.autograd.grad(found, logits)
    (wanted,) = torch.autograd.grad(-(chosen.detach().exp() * chosen).sum(), logits)
    torch.testing.assert_close(gradient, wanted)
    assert objective.sums(model.eval(), batch)["loss"] > found


def test_settings_of_a_run_are_a_config_file(run: Any, tmp_path: Path) -> None:
    """args.json and what --save_config wrote: the same settings, nothing settled by the run counted as given."""
    words = ["--model", "A/B", "--dataset", "a", "--lr", "1e-3", "--target_modules", "linear_qkv", "--packing", "true"]
    before = parse(SftArguments, words)
    for name in ("run.yaml", "run.json"):
        cli._parse(SftArguments, [*words, "--hub_token", "secret", "--save_config", str(tmp_path / name)])
        again = parse(SftArguments, [str(tmp_path / name)])
        assert again.to_dict() == before.to_dict() and again.given == before.given
    _, first = run(sft_main, "out", train_iters=2, split_dataset_ratio=0.25)
    assert sft_main([str(tmp_path / "out" / "args.json"), "--output_dir", str(tmp_path / "again")])["iteration"] == 2
    assert losses(read_run(tmp_path / "again" / "logging.jsonl")) == losses(first)
    # The validation rows of the run, for infer.
    args = InferArguments(model=str(tmp_path / "out" / "checkpoint-2"), load_data_args=True)
    args.model_info = types.SimpleNamespace(model_dir=args.model)  # type: ignore[attr-defined]
    assert ["messages" in row for _, row, _ in validation_data(args)] == [True] * 3


def test_early_stopping_ends_a_run_as_done(run: Any, tmp_path: Path) -> None:
    """Loss is worse with each step at this rate: the run ends, saved, and a signal is not what it says."""
    flags = {"split_dataset_ratio": 0.25, "save_steps": 1, "eval_steps": 1, "early_stop_interval": 2}
    result, _ = run(sft_main, "out", train_iters=8, greater_is_better=True, **flags)
    assert result["signal"] is None and 3 <= result["iteration"] < 8
    assert (tmp_path / "out" / f"checkpoint-{result['iteration']}").is_dir()


def test_weights_only_goes_on_at_the_right_rate(run: Any, tmp_path: Path) -> None:
    flags = {"save_weights_only": "true", "save_steps": 2}
    _, whole = run(sft_main, "run", **flags)
    assert not (tmp_path / "run/checkpoint-2/optimizer.pt").exists()
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    _, lines = run(sft_main, "run", **flags)
    assert [line["lr"] for line in lines] == [line["lr"] for line in whole]


def test_divergence_is_told(run: Any) -> None:
    with pytest.raises(SwiftliteError, match="training has diverged. Lower --lr"):
        run(sft_main, "run", lr=1e18, clip_grad=0)


def test_frozen_parameters_stay(run: Any, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    run(sft_main, "run", train_type="freeze", freeze_parameters="model.embed_tokens", train_iters=2)
    before = load_file(tiny_model("qwen3") / "model.safetensors")
    after = load_file(tmp_path / "run/checkpoint-2/model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_lora_goes_on(family: str, run: Any, tmp_path: Path) -> None:
    flags = {"family": family, "train_type": "lora", "save_steps": 2, "lr": 1e-2, "lora_dropout": 0.1}
    _, whole = run(sft_main, "whole", **flags)
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoint-4")
    _, parts = run(sft_main, "parts", **flags)
    assert losses(parts) == losses(whole)
    flags["adapters"] = tmp_path / "whole/checkpoint-4"  # another run begins where this one ended
    _, further = run(sft_main, "further", **flags)
    assert losses(further)[0] < losses(whole)[-1]


def test_plain_text_is_packed_with_end_tokens(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The quick brown fox. " * (i % 4 + 1) for i in range(12)]
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    seen: list[dict[str, Any]] = []
    sums = HfTrainer.compute_loss

    def spy(self: HfTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append({name: value.clone() for name, value in inputs.items()})
        return sums(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(HfTrainer, "compute_loss", spy)
    _, lines = run(pt_main, "run", dataset=data, max_length=100, global_batch_size=2, micro_batch_size=1)
    assert losses(lines)[-1] < 0.9 * losses(lines)[0]
    batch = seen[0]
    ids, labels, positions = (batch[name][0] for name in ("input_ids", "labels", "position_ids"))
    ends = (ids == 2).nonzero().flatten()  # </s>
    assert len(ends) > 1 and ends[-1] == len(ids) - 1
    begins = (positions == 0).nonzero().flatten()
    assert begins[1:].tolist() == (ends[:-1] + 1).tolist(), "each text is ended, and positions start anew"
    assert torch.equal(labels.masked_fill(positions == 0, -100), labels)
    assert torch.equal(labels[positions > 0], ids[positions > 0]), "every token has a loss, the end tokens too"
    text = "The quick brown fox. " * 40
    data.write_text(json.dumps({"text": text}) + "\n")
    seen.clear()
    run(pt_main, "long", dataset=data, max_length=50, global_batch_size=1, micro_batch_size=1, train_iters=8)
    assert max(batch["input_ids"].numel() for batch in seen) <= 50, "longer texts are cut, not dropped"
    assert len(seen) == 8


# ---- preference pairs ----


def rewards(lines: list[dict[str, Any]]) -> list[float]:
    return [line["rewards/margins"] for line in lines if "rewards/margins" in line]


def test_dpo_learns_the_preference(run: Any) -> None:
    _, lines = run(dpo_main, "run", split_dataset_ratio=0.25, eval_steps=2, rpo_alpha=0.1, train_iters=6)
    trained = [line for line in lines if "loss" in line]
    assert trained[0]["rewards/margins"] == pytest.approx(0, abs=1e-4), "the reference is the start"
    assert trained[-1]["rewards/accuracies"] == 1 and trained[-1]["loss"] < 0.8 * trained[0]["loss"]
    assert lines[-1]["eval_rewards/accuracies"] == 1 and lines[-1]["eval_nll_loss"] > 0
    names = {name for line in trained for name in line} - {"step", "total_steps"}
    assert names == set(METERS) - {"mfu", "loss_scale", "skipped_steps", "eval_loss", "kl"}


def test_dpo_in_other_ways_is_the_same(run: Any) -> None:
    """Micro batches, joined sequences, a reference by name, one computed before: one curve."""
    flags = {"lr": 5e-4, "rpo_alpha": 0.5}
    _, first = run(dpo_main, "a", **flags)
    wanted = [(line["loss"], line["grad_norm"], line["rewards/chosen"]) for line in first]
    others: list[dict[str, Any]] = [
        {"micro_batch_size": 1}, {"padding_free": "true"}, {"precompute_ref_log_probs": "true"},
    ]  # fmt: skip
    for i, other in enumerate(others):
        _, lines = run(dpo_main, f"b{i}", **flags, **other)
        found = [(line["loss"], line["grad_norm"], line["rewards/chosen"]) for line in lines]
        for one, two in zip(wanted, found, strict=True):
            assert two == pytest.approx(one, rel=2e-5, abs=1e-5), other


def test_another_reference_is_another_loss(run: Any, tiny_model: Callable[..., Path]) -> None:
    own = run(dpo_main, "a", train_iters=1)[1][0]["loss"]
    other = run(dpo_main, "b", train_iters=1, ref_model=tiny_model("qwen3", seed=5))[1][0]["loss"]
    assert abs(own - other) > 1e-3
    with pytest.raises(UsageError, match="must read the same tokens|reference must read"):
        run(dpo_main, "c", ref_model=tiny_model("qwen3", vocab_size=333))


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_lora_dpo_equals_a_reference_by_name(family: str, run: Any, tiny_model: Callable[..., Path]) -> None:
    """Adapters off is the base model; and a resumed run keeps the same reference."""
    flags = {"family": family, "train_type": "lora", "lr": 1e-2}
    _, off = run(dpo_main, "off", **flags)
    _, named = run(dpo_main, "named", ref_model=tiny_model(family), **flags)
    assert losses(named) == pytest.approx(losses(off), rel=1e-5)
    assert rewards(off)[-1] > 0.1


def test_dpo_goes_on(run: Any, tmp_path: Path) -> None:
    flags = {"save_steps": 2, "loss_type": "ipo"}
    _, whole = run(dpo_main, "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoint-4")
    _, parts = run(dpo_main, "parts", **flags)
    assert losses(parts) == losses(whole) and rewards(parts) == rewards(whole)


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_bf16_policy_and_reference_begin_equal(family: str, run: Any) -> None:
    _, lines = run(dpo_main, "run", family=family, torch_dtype="bfloat16", train_iters=1)
    assert lines[0]["rewards/chosen"] == lines[0]["rewards/rejected"] == 0


def test_pairs(tiny_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    from swiftlite.llm.dataset.preprocess import preprocess
    from swiftlite.llm.template import get_template

    template = get_template("qwen3", AutoTokenizer.from_pretrained(tiny_tokenizer_dir), loss_scale="last_round")
    rows = [preprocess(row) for row in ROWS[:4]]
    useless = [{"messages": rows[0]["messages"]}, {**rows[0], "rejected_messages": rows[0]["messages"]}]
    dataset = PairDataset(rows + useless, template, max_drop_ratio=0.5)
    assert dataset.report.reasons.keys() == {"no rejected answer", "both answers are the same"}
    assert len(dataset) == dataset.pairs == 4
    chosen, rejected = sequences_of([dataset[1]])
    assert [chosen["input_ids"], rejected["input_ids"]] == [
        template.encode({"messages": rows[1][key]})["input_ids"] for key in ("messages", "rejected_messages")
    ]
    assert dataset.lengths[1] == len(chosen["input_ids"]) + len(rejected["input_ids"])
    packed = PairDataset(rows, template, capacity=2 * max(dataset.lengths))
    assert len(packed) < 4 and sum(len(item["pairs"]) for item in packed) == 4
    assert [len(rows) for rows in packed.items] != [1] * len(packed)
    with pytest.raises(DatasetError, match="no rejected answer"):
        PairDataset(useless[:1], template)
    half = {"role": "assistant", "content": "Half of it.", "loss_scale": 0.5}
    for key in ("messages", "rejected_messages"):  # a weight that preference losses cannot give is not ignored
        weighed = {**rows[0], key: [*rows[0][key][:-1], half]}
        with pytest.raises(DatasetError, match="a loss weight other than 0 and 1"):
            PairDataset([weighed], template)
