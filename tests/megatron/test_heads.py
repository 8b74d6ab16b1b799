"""Classifiers and reward models on Megatron in one process: against transformers' own, and saved in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from swiftlite.cli.main import main as swiftlite_main
from swiftlite.llm.train.reward import reward_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.classification import ClassificationTrainer
from swiftlite.megatron.trainers.pooled import PooledBatch
from swiftlite.megatron.trainers.reward import RewardTrainer, megatron_reward_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.utils.errors import UsageError
from tests.megatron.conftest import values
from tests.rows import preference_rows

WORDS = ("good", "bad at all", "neither of them")
LABELLED = [
    {"messages": [{"role": "user", "content": f"Film {i}: {WORDS[i % 3]}. " + "It is long. " * (i % 4)}], "label": i % 3}
    for i in range(12)
]  # fmt: skip
LORA = {"train_type": "lora", "lora_rank": 4, "lora_dropout": 0, "lr": 5e-3}


@pytest.fixture
def run(train: Any) -> Callable[..., list[dict[str, Any]]]:
    """run(main, output, family, flag=value...) -> the lines of logging.jsonl."""

    def start(main: Any, output: str, family: str = "qwen3", **flags: Any) -> list[dict[str, Any]]:
        if flags.get("rlhf_type") == "rm":
            return train(main, output, preference_rows(12), family, **flags)
        return train(main, output, LABELLED, family, **{"task_type": "seq_cls", "num_labels": 3, **flags})

    return start


Seen = list[tuple[list[list[int]], torch.Tensor]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(ids of each sample, scores [N, L]) of every micro batch that is judged."""
    found: Seen = []

    def spied(judge: Any) -> Any:
        def changed(self: Any, batch: PooledBatch, outputs: torch.Tensor) -> Any:
            assert batch.sequences is not None
            samples = [batch.tokens[batch.sequences == number].tolist() for number in range(len(batch.ends))]
            found.append((samples, outputs.detach().clone()))
            return judge(self, batch, outputs)

        return changed

    for trainer in (ClassificationTrainer, RewardTrainer):
        monkeypatch.setattr(trainer, "judge", spied(trainer.judge))
    return found


def scores_of(model: Any, samples: list[list[int]]) -> torch.Tensor:
    """Of transformers' model, each sample alone."""
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits for ids in samples])


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "mla"])
@pytest.mark.parametrize("flags", [{}, {"padding_free": "true"}, {"packing": "true"}], ids=["padded", "free", "packed"])
def test_scores_are_those_of_transformers(
    family: str, flags: dict[str, Any], run: Any, seen: Seen, tmp_path: Path
) -> None:
    """Of the model that one step at rate 0 saves: the base model with its new head."""
    run(megatron_sft_main, "run", family, lr=0, train_iters=1, save_safetensors="true", **flags)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/iter_0000001-hf").eval()
    assert len({len(ids) for samples, _ in seen for ids in samples}) >= 3
    for samples, scores in seen:
        torch.testing.assert_close(scores, scores_of(saved, samples), rtol=1e-5, atol=1e-5)


EQUAL: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "classes": ("qwen3", sft_main, {}),
    "classes-packed": ("qwen3", sft_main, {"packing": "true"}),
    "classes-moe": ("qwen3_moe", sft_main, {}),
    # At LORA's own rate steps 3 and 4 overshoot, which grows rounding differences a hundredfold in later gradients.
    "classes-lora": ("qwen3", sft_main, {**LORA, "lr": 2e-3}),
    "reward": ("qwen3", reward_main, {"rlhf_type": "rm", "center_rewards_coefficient": 0.1}),
    "reward-mla": ("mla", reward_main, {"rlhf_type": "rm", "lr": 3e-4}),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_transformers(name: str, run: Any) -> None:
    """The same numbers at each of 12 steps in fp32, and in evaluations, from the same head."""
    family, theirs, flags = EQUAL[name]
    flags = {"train_iters": 12, "save_weights_only": "true", "split_dataset_ratio": 0.25, "eval_steps": 6, **flags}
    ours = {sft_main: megatron_sft_main, reward_main: megatron_reward_main}[theirs]
    one, two = (run(main, side, family, **flags) for side, main in (("hf", theirs), ("megatron", ours)))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    names = {"loss", "grad_norm", "accuracy", "micro_f1", "rewards/chosen", "rewards/rejected", "rewards/accuracies"}
    compared = {name for line in one for name in line if name in names or name.startswith("eval_")}
    assert len(compared) > 4 and compared == {n for line in two for n in line if n in names or n.startswith("eval_")}
    for name in compared:
        assert values(two, name) == pytest.approx(values(one, name), rel=1e-5, abs=1e-6), name
    assert min(values(one, "loss")) < 0.8 * one[0]["loss"]


def test_a_trained_classifier_answers_in_transformers(run: Any, seen: Seen, tmp_path: Path) -> None:
    """With its own names of classes and padding; it is trained on from either format, and goes both ways."""
    lines = run(
        megatron_sft_main, "run", train_iters=8, save_safetensors="true", split_dataset_ratio=0.25, eval_steps=8
    )
    assert values(lines, "loss")[-1] < 0.7 * values(lines, "loss")[0]
    assert {"eval_loss", "eval_accuracy", "eval_micro_f1", "eval_macro_f1"} >= {n for n in lines[-1] if n[:4] == "eval"}
    saved = tmp_path / "run/iter_0000008-hf"
    model = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    assert model.config.num_labels == 3 and model.config.problem_type == "single_label_classification"
    assert model.config.pad_token_id == 0
    samples, scores = seen[-1]  # of the evaluation after the last step
    torch.testing.assert_close(scores, scores_of(model, samples), rtol=1e-5, atol=1e-5)
    words = ["--mcore_model", str(tmp_path / "run"), "--to_hf", "true", "--output_dir", str(tmp_path / "back")]
    assert swiftlite_main(["export", *words]) == 0
    assert (tmp_path / "back/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    again = [
        run(megatron_sft_main, name, num_labels=None, train_iters=1, **where)
        for name, where in (("hf", {"model": saved}), ("mcore", {"model": None, "mcore_model": tmp_path / "run"}))
    ]
    assert again[0][0]["loss"] == again[1][0]["loss"] < values(lines, "loss")[0]
    with pytest.raises(UsageError, match="has 3"):
        run(megatron_sft_main, "other", model=saved, num_labels=2)


def test_adapters_with_a_head(run: Any, seen: Seen, tmp_path: Path, model_of: Callable[[str], Path]) -> None:
    """peft loads what was trained; it goes to Megatron and back bit for bit, merges, and is trained on."""
    from peft import PeftModel

    lines = run(megatron_sft_main, "run", train_iters=8, split_dataset_ratio=0.25, eval_steps=8, **LORA)
    assert values(lines, "loss")[-1] < 0.7 * values(lines, "loss")[0]
    adapter, (samples, scores) = tmp_path / "run/iter_0000008", seen[-1]
    base = AutoModelForSequenceClassification.from_pretrained(model_of("qwen3"), num_labels=3)
    torch.testing.assert_close(
        scores, scores_of(PeftModel.from_pretrained(base, adapter).eval(), samples), rtol=1e-5, atol=1e-5
    )
    common = ["--model", str(model_of("qwen3")), "--output_dir"]
    for words in (
        ["mcore", "--adapters", adapter, "--to_mcore", "true"],
        ["peft", "--mcore_adapter", tmp_path / "mcore", "--to_hf", "true"],
        ["merged", "--adapters", adapter, "--merge_lora", "true"],
        ["merged-mcore", "--mcore_adapter", tmp_path / "mcore", "--merge_lora", "true", "--to_mcore", "true"],
    ):
        assert swiftlite_main(["export", *common, str(tmp_path / str(words[0])), *map(str, words[1:])]) == 0
    ours, back = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "peft"))
    assert ours.keys() == back.keys() and "base_model.model.score.weight" in ours
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.pad_token_id == 0
    torch.testing.assert_close(scores, scores_of(merged, samples), rtol=1e-5, atol=1e-5)
    further = [
        run(megatron_sft_main, name, train_iters=1, **LORA, **where)[0]["loss"]
        for name, where in (("more", {"adapters": adapter}), ("whole", {"model": tmp_path / "merged-mcore"}))
        if name == "more"
    ]
    whole = run(
        megatron_sft_main, "full", model=None, mcore_model=tmp_path / "merged-mcore", num_labels=None, train_iters=1
    )
    assert further[0] == pytest.approx(whole[0]["loss"], rel=1e-5) and further[0] < values(lines, "loss")[0]


@pytest.mark.parametrize("flags", [{}, {"packing": "true"}, LORA], ids=["padded", "packed", "lora"])
def test_reward_models(flags: dict[str, Any], run: Any, seen: Seen, tmp_path: Path) -> None:
    settings = {"rlhf_type": "rm", "train_iters": 8, "split_dataset_ratio": 0.25, "eval_steps": 8, "merge_lora": None}
    if "train_type" in flags:
        settings["merge_lora"] = "true"
    lines = run(megatron_reward_main, "run", save_safetensors="true", **{**settings, **flags})
    assert values(lines, "loss")[-1] < 0.8 * values(lines, "loss")[0]
    assert values(lines, "rewards/margins")[-1] > 0.2 and 0 <= lines[-1]["eval_rewards/accuracies"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/iter_0000008-hf").eval()
    assert model.config.num_labels == 1
    samples, scores = seen[-1]
    torch.testing.assert_close(scores, scores_of(model, samples), rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on(run: Any, tmp_path: Path) -> None:
    """With its trained head, also beside adapters."""
    for name, flags in (("full", {}), ("lora", LORA)):
        whole = run(megatron_sft_main, name, save_steps=2, **flags)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("2")  # as if it had been killed in step 3
        assert values(run(megatron_sft_main, name, save_steps=2, **flags), "loss") == values(whole, "loss")


KINDS = {"multi_label_classification": [[0], [1, 2], []], "regression": [[0.5, 1, -1], [0, 0, 2], [1, 1.5, 3]]}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_labels(kind: str, run: Any, tmp_path: Path) -> None:
    labels = KINDS[kind]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({**row, "label": labels[row["label"]]}) + "\n" for row in LABELLED))
    lines = run(
        megatron_sft_main, "run", dataset=rows, problem_type=kind, train_iters=8, lr=3e-3, save_safetensors="true"
    )
    assert values(lines, "loss")[-1] < 0.8 * values(lines, "loss")[0]
    config = json.loads((tmp_path / "run/iter_0000008-hf/config.json").read_text())
    assert config["problem_type"] == kind
