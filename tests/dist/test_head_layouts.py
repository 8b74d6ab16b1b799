"""Classifiers, reward models, embedding models and rerankers under parallel layouts: the same steps as in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swiftlite.train.plot import read_run
from tests.dist.launch import curve, largest_difference, run_cases, run_layouts
from tests.rows import GROUPS, LABELLED, UNEVEN_PAIRS

pytestmark = pytest.mark.dist

STEPS = 8
TOLERANCE = 1e-5  # relative, of loss and gradient norm, in fp32

MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "vocab_size": 333, "tie_word_embeddings": True, "initializer_range": 0.02},
    "qwen3_moe": {"num_hidden_layers": 2, "vocab_size": 333, "initializer_range": 0.02},
}
SMALL = ["--micro_batch_size", "2"]  # see test_layouts.py
TP = ["--tensor_model_parallel_size", "2", "--sequence_parallel", "true"]
PP = ["--pipeline_model_parallel_size", "2"]
EP = ["--expert_model_parallel_size", "2"]
CP = ["--context_parallel_size", "2"]
PACKED = ["--packing", "true", "--max_length", "200", "--global_batch_size", "2", "--micro_batch_size", "1"]
CLASSES = ["--task_type", "seq_cls", "--num_labels", "3"]
EMBEDDING = ["--task_type", "embedding", "--lr", "3e-4"]
RERANKER = ["--task_type", "reranker", "--loss_type", "listwise_reranker"]
GENERATIVE = ["--task_type", "generative_reranker", "--generative_reranker_positive_token", "y", "--max_length", "400",
              "--generative_reranker_negative_token", "n", "--loss_type", "listwise_reranker", "--lr", "3e-4"]  # fmt: skip
LORA = ["--train_type", "lora", "--lora_rank", "4", "--lora_dropout", "0", "--lr", "1e-3"]
REWARD = ["--rlhf_type", "rm", "--center_rewards_coefficient", "0.1"]

# What one process runs: command, family, flags. The others are compared with the one they name.
ALONE: dict[str, tuple[str, str, list[str]]] = {
    "classes": ("sft", "qwen3", CLASSES),
    "classes-packed": ("sft", "qwen3", [*CLASSES, *PACKED]),
    "classes-moe": ("sft", "qwen3_moe", CLASSES),
    "reward-mla": ("dpo", "moonlight", [*REWARD, "--lr", "2e-4"]),
    "reward": ("dpo", "qwen3", REWARD),
    "embedding": ("sft", "qwen3", EMBEDDING),
    "embedding-lora": ("sft", "qwen3", [*EMBEDDING, *LORA]),
    "reranker": ("sft", "qwen3", RERANKER),
    "reranker-free": ("sft", "qwen3", [*RERANKER, "--padding_free", "true"]),
    "reranker-moe": ("sft", "qwen3_moe", RERANKER),
    "generative": ("sft", "qwen3", GENERATIVE),
}
# one process' run, world size, flags, fault
LAYOUTS: dict[str, tuple[str, int, list[str], str | None]] = {
    "classes-dp2": ("classes", 2, SMALL, None),
    "classes-tp2": ("classes", 2, TP[:2], None),
    "classes-tp2-sp": ("classes", 2, TP, None),
    "classes-pp2": ("classes", 2, PP, None),
    "classes-cp2": ("classes", 2, CP, None),
    "classes-packed-tp2-sp": ("classes-packed", 2, TP, None),
    "classes-packed-cp2": ("classes-packed", 2, CP, None),
    "classes-moe-ep2": ("classes-moe", 2, EP, None),
    "reward-mla-tp2-sp": ("reward-mla", 2, TP, None),
    "reward-dp2": ("reward", 2, SMALL, None),
    "reward-tp2-sp": ("reward", 2, TP, None),
    "reward-pp2": ("reward", 2, PP, None),
    # Negatives are of all ranks' micro batches: half as large ones on two ranks are the same batch.
    "embedding-dp2": ("embedding", 2, SMALL, None),
    "embedding-tp2": ("embedding", 2, TP[:2], None),
    "embedding-pp2": ("embedding", 2, PP, None),
    "embedding-cp2": ("embedding", 2, CP, None),
    "embedding-lora-tp2-sp": ("embedding-lora", 2, TP, None),
    "reranker-dp2": ("reranker", 2, SMALL, None),
    "reranker-tp2-sp": ("reranker", 2, TP, None),
    "reranker-vpp2": ("reranker", 2, [*PP, "--num_virtual_stages_per_pipeline_rank", "2"], None),
    "reranker-free-cp2": ("reranker-free", 2, CP, None),
    "reranker-moe-ep2": ("reranker-moe", 2, EP, None),
    "generative-tp2-sp": ("generative", 2, TP, None),
    "generative-pp2": ("generative", 2, PP, None),
    "generative-cp2": ("generative", 2, CP, None),
    "control-other-batch": ("embedding", 2, [], None),
    "control-own-scores": ("classes", 2, TP, "own_scores"),
}  # fmt: skip
EQUAL = [name for name in LAYOUTS if not name.startswith("control-")]


@pytest.fixture(scope="module")
def case(
    tiny_model: Callable[..., Path], tiny_mla: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, Any]]:
    """`case("classes", OUTPUT_DIR, flags)`: what the worker takes; the same 8 rows at every step, 3 for evaluation."""
    root = tmp_path_factory.mktemp("data")
    for name, rows in (("sft", LABELLED), ("dpo", UNEVEN_PAIRS), ("groups", GROUPS)):
        for part, some in (("train", rows[:8]), ("val", rows[8:])):
            (root / f"{name}-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    def make(alone: str, output_dir: Path, flags: list[str]) -> dict[str, Any]:
        command, family, own = ALONE[alone]
        data = command if command == "dpo" or "seq_cls" in own else "groups"
        common = {
            "model": tiny_mla(0) if family == "moonlight" else tiny_model(family, **MODELS[family]),
            "model_type": family, "dataset": root / f"{data}-train.jsonl",
            "val_dataset": root / f"{data}-val.jsonl", "eval_steps": 4, "output_dir": output_dir,
            "torch_dtype": "float32", "micro_batch_size": 4, "global_batch_size": 8, "train_iters": STEPS, "lr": 1e-3,
            "logging_steps": 1, "save_steps": 1000, "save_weights_only": "true", "report_to": "none", "adam_eps": 1e-5,
        }  # fmt: skip
        words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
        return {"command": command, "argv": [*words, *own, *(flags if flags is not own else [])]}

    return make


@pytest.fixture(scope="module")
def root(case: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with all runs."""
    root = tmp_path_factory.mktemp("layouts")
    run_layouts({name: (name, 1, [], None) for name in ALONE} | LAYOUTS, case, root)
    return root


@pytest.mark.parametrize("name", ALONE)
def test_it_is_learnable(root: Path, name: str) -> None:
    losses = [loss for loss, _ in curve(root / name)]
    assert len(losses) == STEPS and losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("name", EQUAL)
def test_layout_equals_one_process(root: Path, name: str) -> None:
    alone = LAYOUTS[name][0]
    assert largest_difference(curve(root / alone), curve(root / name)) <= TOLERANCE
    one, several = (
        [line for line in read_run(root / run / "logging.jsonl") if "eval_loss" in line] for run in (alone, name)
    )
    assert len(one) == len(several) == STEPS // 4
    for mine, theirs in zip(several, one, strict=True):
        for metric in (metric for metric in theirs if metric.startswith("eval_")):
            assert mine[metric] == pytest.approx(theirs[metric], rel=TOLERANCE, abs=TOLERANCE), metric


def test_a_planted_mistake_is_seen(root: Path) -> None:
    """Scores of a rank's own part of the sequence, whose gradients nobody adds up."""
    name = "control-own-scores"
    assert largest_difference(curve(root / "classes"), curve(root / name)) > 100 * TOLERANCE
    name = "control-other-batch"  # micro batches of 2 on two ranks are a batch of 4
    assert largest_difference(curve(root / "embedding"), curve(root / name)) > 100 * TOLERANCE


def test_a_killed_run_goes_on_under_another_layout(
    case: Callable[..., dict[str, Any]], root: Path, tmp_path: Path
) -> None:
    """The head begins anew in neither of them."""
    flags = ["--save_steps", "4", "--save_weights_only", "false"]
    for layout, fault in ((TP, "end_after_6"), (PP, None)):
        code, log = run_cases(2, [{**case("classes", tmp_path / "run", [*flags, *layout]), "fault": fault}])
        assert code == 0, log[-5000:]
    assert "resuming from step 4" in log
    assert largest_difference(curve(root / "classes"), curve(tmp_path / "run")) <= TOLERANCE
