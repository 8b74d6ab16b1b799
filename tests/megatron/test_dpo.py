"""`megatron dpo` in one process against `dpo` with transformers: log-probabilities, losses, references, resumption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.cli.export import export_main
from swiftlite.cli.main import find_route
from swiftlite.llm.train.dpo import dpo_main
from swiftlite.llm.train.rlhf import rlhf_main
from swiftlite.megatron.trainers.dpo import DpoTrainer, megatron_dpo_main
from swiftlite.megatron.trainers.pairs import PairBatch
from swiftlite.megatron.trainers.rlhf import megatron_rlhf_main
from swiftlite.megatron.trainers.with_reference import ReferenceTrainer
from swiftlite.train.dpo_loss import LogProbs, PairLoss
from swiftlite.train.meters import METERS
from swiftlite.utils.errors import DatasetError, UsageError
from tests.megatron.conftest import values
from tests.rows import preference_rows

ROWS = preference_rows(12)
TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "qwen3_moe": "qwen3_moe", "mla": "moonlight"}
STEPS = 20
# Metrics that sums of many numbers make, near 0 in the first step: compared absolutely as well.
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl")


@pytest.fixture
def run(train: Any) -> Callable[..., list[dict[str, Any]]]:
    """run(main, output, family, flag=value...) on ROWS -> the lines of logging.jsonl."""

    def start(main: Any, output: str, family: str = "qwen3", **flags: Any) -> list[dict[str, Any]]:
        return train(main, output, ROWS, family, **{"model_type": TYPES[family], **flags})

    return start


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Losses and gradient norms within 1e-5 relative at every step; what is logged with them has the same values."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert values(ours, "loss")
    for name in ("loss", "grad_norm", "lr", "logps/chosen", "logps/rejected", "nll_loss", "rewards/accuracies"):
        assert values(ours, name) == pytest.approx(values(theirs, name), rel=1e-5), name
    for name in REWARDS:
        assert values(ours, name) == pytest.approx(values(theirs, name), rel=1e-5, abs=1e-5), name


# Smoothed and hinge losses have a minimum that a larger rate reaches; near it a gradient is a difference of equal numbers.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1, "lr": 1e-4},
    "ipo": {"loss_type": "ipo", "lr": 5e-4},
    "hinge": {"loss_type": "hinge", "beta": 0.05, "lr": 1e-4},
    "rpo": {"rpo_alpha": 0.7},
    "simpo": {"rlhf_type": "simpo", "lr": 5e-4},
    "orpo": {"rlhf_type": "orpo"},
    "kto": {"rlhf_type": "kto", "beta": 0.05, "lr": 1e-3},  # of each pair's two answers
    "gkd": {"rlhf_type": "gkd", "sft_alpha": 0.2, "temperature": 0.8},
}
CASES = [*(("qwen3", kind) for kind in KINDS), ("glm4_moe", "sigmoid"), ("qwen3_moe", "rpo"), ("mla", "sigmoid")]


@pytest.mark.parametrize("family, kind", CASES)
def test_equal_to_transformers(family: str, kind: str, run: Any, model_of: Callable[..., Path]) -> None:
    """20 steps in fp32 against a reference that differs from the policy."""
    flags = {"train_iters": STEPS, "save_weights_only": "true", **KINDS[kind]}
    if kind not in ("simpo", "orpo"):
        flags["teacher_model" if kind == "gkd" else "ref_model"] = model_of(family, seed=1)
    theirs, ours = (run(main, main.__name__, family, **flags) for main in (rlhf_main, megatron_rlhf_main))
    compare(ours, theirs)
    assert len(values(ours, "loss")) == STEPS
    assert ours[-1]["loss"] < 0.75 * ours[0]["loss"]


LORA = {"train_type": "lora", "lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0, "lr": 5e-3}


@pytest.mark.parametrize(
    "family, more",
    # At a higher rate the MoE's routing flips on rounding differences, on some processors.
    [
        ("qwen3", {}),
        ("glm4_moe", {"lr": 2.5e-3}),
        ("mla", {}),
        ("qwen3", {"modules_to_save": "lm_head,model.norm", "lr": 2e-3}),
    ],
)
def test_lora_equals_transformers(family: str, more: dict[str, Any], run: Any) -> None:
    """20 steps in fp32 from the same A and B; the reference is the model with its adapters off."""
    flags = {"train_iters": STEPS, "save_weights_only": "true", "rpo_alpha": 0.2, **LORA, **more}
    theirs, ours = (run(main, main.__name__, family, **flags) for main in (dpo_main, megatron_dpo_main))
    compare(ours, theirs)
    assert ours[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert ours[-1]["loss"] < 0.75 * ours[0]["loss"] and ours[-1]["rewards/margins"] > 1


def test_lora_in_other_ways_is_the_same(run: Any, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Adapters off is the base model by name, and what the reference said before training; a resumed run agrees."""
    flags = {**LORA, "rpo_alpha": 0.5, "split_dataset_ratio": 0.25, "eval_steps": 2, "save_steps": 2}
    wanted = run(megatron_dpo_main, "whole", **flags)
    for i, other in enumerate([{"ref_model": model_of("qwen3")}, {"precompute_ref_log_probs": "true"}]):
        compare(run(megatron_dpo_main, f"other{i}", **flags, **other), wanted)
    (tmp_path / "whole/latest_checkpointed_iteration.txt").write_text("2")  # as if it had been killed in step 3
    again = run(megatron_dpo_main, "whole", **flags)
    for name in ("step", "loss", "grad_norm", *REWARDS):
        assert values(again, name) == values(wanted, name), name
    adapters = tmp_path / "whole/iter_0000004"
    with pytest.raises(UsageError, match="give the same directory with --ref_adapters"):
        run(megatron_dpo_main, "further", **flags, adapters=adapters)
    del flags["split_dataset_ratio"]
    further = {**flags, "adapters": adapters, "ref_adapters": adapters}
    theirs, ours = (run(main, main.__name__, **further) for main in (dpo_main, megatron_dpo_main))
    compare(ours, theirs)
    assert ours[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and ours[-1]["rewards/margins"] > 0.1
    logged = [line["rewards/margins"] for line in run(dpo_main, "from base", **{**flags, "ref_adapters": adapters})]
    assert logged[0] < -0.1, "the reference is another model than the start"


def test_what_the_reference_said_is_kept(
    run: Any, model_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same reference is not asked the same again; another one is, and where the file is cut off."""
    monkeypatch.setenv("SWIFTLITE_CACHE", str(tmp_path / "cache"))
    asked: list[int] = []
    ask = ReferenceTrainer.ask
    monkeypatch.setattr(ReferenceTrainer, "ask", lambda self, q: asked.append(len(q)) or ask(self, q))
    flags: dict[str, Any] = {"precompute_ref_log_probs": "true", "train_iters": 1}
    first = run(megatron_dpo_main, "one", **flags)
    again = run(megatron_dpo_main, "two", **flags)
    assert asked == [24] and [line["loss"] for line in again] == [line["loss"] for line in first]
    (kept,) = (tmp_path / "cache/reference").iterdir()
    kept.write_bytes(kept.read_bytes()[:-4])
    run(megatron_dpo_main, "three", **flags)
    run(megatron_dpo_main, "four", **flags, ref_model=model_of("qwen3", seed=1))
    assert asked == [24] * 3


def test_labelled_answers_in_other_ways(run: Any) -> None:
    """KTO with LoRA on both sides, in micro batches, joined, with what the reference said before training: one curve."""
    flags = {**LORA, "rlhf_type": "kto", "undesirable_weight": 0.7, "split_dataset_ratio": 0.2, "eval_steps": 2}
    wanted = run(rlhf_main, "hf", **flags, micro_batch_size=4)
    evaluations = [line for line in wanted if "eval_loss" in line]
    assert len(evaluations) == 2 and evaluations[-1]["eval_rewards/margins"] and any(line.get("kl") for line in wanted)
    known: dict[str, Any] = {"precompute_ref_log_probs": "true", "micro_batch_size": 1}
    for main, output, other in (
        (megatron_rlhf_main, "one", {}), (megatron_rlhf_main, "known", known), (rlhf_main, "hf-known", known),
        (megatron_rlhf_main, "free", {"padding_free": "true"}), (rlhf_main, "hf-free", {"padding_free": "true"}),
    ):  # fmt: skip
        found = run(main, output, **flags, **other)
        compare(found, wanted)
        for mine, line in zip((line for line in found if "eval_loss" in line), evaluations, strict=True):
            for name in (n for n in line if n.startswith("eval_")):
                assert mine[name] == pytest.approx(line[name], rel=1e-5, abs=1e-5), name


def test_labelled_answers_packed(run: Any, model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Packed, both sides are one curve; a sequence of all answers is their global batch. A cached dataset is the rows."""
    flags = {**LORA, "rlhf_type": "kto", "undesirable_weight": 0.7, "packing": "true", "max_length": 150}
    batches = {"packing_length": 400, "global_batch_size": 2, "micro_batch_size": 1}
    wanted = run(rlhf_main, "hf", **flags, **batches)
    assert any(line.get("kl") for line in wanted)
    compare(run(megatron_rlhf_main, "mcore", **flags, **batches), wanted)
    compare(run(megatron_rlhf_main, "known", **flags, **batches, precompute_ref_log_probs="true"), wanted)
    made = tmp_path / "made"
    words = {"dataset": None, "cached_dataset": made}
    same = {
        "model": model_of("qwen3"), "model_type": "qwen3", "template": "qwen3", "dataset": tmp_path / "data.jsonl",
        "max_length": 150, "to_cached_dataset": "true", "template_mode": "kto", "output_dir": made,
    }  # fmt: skip
    export_main([word for name, value in same.items() for word in (f"--{name}", str(value))])
    for name, main in (("cached-hf", rlhf_main), ("cached", megatron_rlhf_main)):
        compare(run(main, name, **flags, **batches, **words), wanted)
    with pytest.raises(
        DatasetError, match="holds labelled answers; train on them with `swiftlite rlhf --rlhf_type kto`"
    ):
        run(dpo_main, "refused", **words, max_length=150)
    unpaired = {**flags, "loss_type": "apo_zero_unpaired", "train_iters": 3}
    one = {"packing_length": 5000, "global_batch_size": 1, "micro_batch_size": 1}
    apart = {"packing": None, "global_batch_size": 24, "micro_batch_size": 8}
    compare(run(megatron_rlhf_main, "one", **{**unpaired, **one}), run(rlhf_main, "apart", **{**unpaired, **apart}))


def test_the_reference_has_no_dropout(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout is the policy's alone, and is back after the reference has answered."""
    answer, answers = DpoTrainer.answer, []

    def spy(self: DpoTrainer, batches: list[PairBatch]) -> None:
        answer(self, batches)
        answers.append(torch.cat([batch.reference for batch in batches if batch.reference is not None]))
        assert all(model.training for model in self.models)

    monkeypatch.setattr(DpoTrainer, "answer", spy)
    flags = {**LORA, "train_iters": 1}
    without, dropped = (run(megatron_dpo_main, f"dropout{p}", attention_dropout=p, **flags)[0] for p in (0, 0.5))
    assert torch.equal(*answers)
    assert abs(without["rewards/chosen"]) < 1e-5 < 1e-2 < abs(dropped["rewards/chosen"])


# ---- log-probabilities of each answer ----


def hf_log_probs(directory: Path, batches: list[PairBatch]) -> list[float]:
    """Of the answers in Megatron's batches, each run alone through transformers' model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for batch in batches:
        for answer in range(batch.num_answers):
            here = batch.sequence_ids == answer
            tokens, labels, mask = (t[here] for t in (batch.tokens, batch.labels, batch.loss_mask))
            assert 0 < mask.sum() < len(mask)
            with torch.no_grad():
                logits = model(tokens[None]).logits[0]
            found.append(float((logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] * mask).sum()))
    return found


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
@pytest.mark.parametrize("flags", [{}, {"padding_free": "true"}, {"packing": "true"}], ids=["padded", "free", "packed"])
def test_log_probs_of_each_answer(
    family: str, flags: dict[str, Any], run: Any, model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of policy and reference, on pairs of different lengths, as transformers' models give them."""
    seen: list[tuple[PairBatch, LogProbs, LogProbs]] = []
    sums = PairLoss.sums

    def spy_sums(self: PairLoss, policy: LogProbs, reference: LogProbs) -> Any:
        seen.append((current[-1], LogProbs(policy.sums.detach(), policy.tokens), reference))
        return sums(self, policy, reference)

    current: list[PairBatch] = []
    loss = DpoTrainer.loss

    def spy_loss(self: DpoTrainer, batch: PairBatch, losses: torch.Tensor) -> Any:
        current.append(batch)
        return loss(self, batch, losses)

    monkeypatch.setattr(PairLoss, "sums", spy_sums)
    monkeypatch.setattr(DpoTrainer, "loss", spy_loss)
    run(megatron_dpo_main, "run", family, ref_model=model_of(family, seed=1), train_iters=1, **flags)
    batches = [batch for batch, _, _ in seen]
    lengths = {n for batch in batches for n in batch.sample_lengths}
    assert len(batches) == 2 and len(lengths) >= 5
    for seed, found in ((0, [p.sums for _, p, _ in seen]), (1, [r.sums for _, _, r in seen])):
        assert torch.cat(found).tolist() == pytest.approx(hf_log_probs(model_of(family, seed), batches), rel=1e-5)
    first, second = (torch.cat(part) for part in ([p.sums for _, p, _ in seen], [r.sums for _, _, r in seen]))
    assert ((first - second).abs() > 1e-3 * first.abs()).any(), "the reference differs from the policy"


# ---- the same thing in other ways ----


def test_other_ways_are_the_same(run: Any, model_of: Callable[..., Path]) -> None:
    """Micro batches, joined sequences, a reference by name, one computed before, one in Megatron's format: one curve."""
    flags = {"rpo_alpha": 0.5, "split_dataset_ratio": 0.25, "eval_steps": 2}
    wanted = run(megatron_dpo_main, "whole", **flags)
    mcore = Path(export_main(["--model", str(model_of("qwen3")), "--model_type", "qwen3", "--to_mcore", "true",
                              "--output_dir", str(model_of("qwen3").parent / "mcore")]))  # fmt: skip
    others: list[dict[str, Any]] = [
        {"micro_batch_size": 1}, {"padding_free": "true"}, {"precompute_ref_log_probs": "true"},
        {"ref_model": model_of("qwen3")}, {"ref_model": mcore}, {"padding_free": "true", "micro_batch_size": 4},
    ]  # fmt: skip
    for i, other in enumerate(others):
        compare(run(megatron_dpo_main, f"other{i}", **flags, **other), wanted)


@pytest.mark.parametrize("way", ["evaluation", "packed"])
def test_equal_to_transformers_in_other_ways(way: str, run: Any, model_of: Callable[..., Path]) -> None:
    """Evaluation counts the pairs of a partial batch like all others; packing joins the same pairs."""
    flags: dict[str, Any] = {"rpo_alpha": 0.3, "ref_model": model_of("qwen3", seed=1)}
    if way == "evaluation":
        flags |= {"split_dataset_ratio": 0.25, "eval_steps": 2, "micro_batch_size": 2}
    else:
        flags |= {"packing": "true", "max_length": 150, "micro_batch_size": 1, "global_batch_size": 2}
    theirs, ours = run(dpo_main, "hf", **flags), run(megatron_dpo_main, "mcore", **flags)
    compare(ours, theirs)
    evaluations = [[line for line in lines if "eval_loss" in line] for lines in (ours, theirs)]
    assert len(evaluations[0]) == len(evaluations[1]) == (2 if way == "evaluation" else 0)
    for mine, other in zip(*evaluations, strict=True):
        assert set(mine) == set(other)
        for name in set(mine) - {"elapsed_s", "remaining_s"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


def test_a_reference_of_another_shape(run: Any, model_of: Callable[..., Path]) -> None:
    flags = {"ref_model": model_of("qwen3", seed=1, num_hidden_layers=3, hidden_size=32), "train_iters": 2}
    compare(run(megatron_dpo_main, "mcore", **flags), run(dpo_main, "hf", **flags))
    with pytest.raises(UsageError, match="has 320 rows in its vocabulary.* must read the same tokens"):
        run(megatron_dpo_main, "other", ref_model=model_of("qwen3", vocab_size=320))


def test_metrics_have_their_names(run: Any) -> None:
    lines = run(megatron_dpo_main, "run", split_dataset_ratio=0.25, eval_steps=2, rpo_alpha=0.1, train_iters=6)
    trained = [line for line in lines if "loss" in line]
    assert {name for line in trained for name in line} - {"step", "total_steps"} == set(METERS) - {
        "mfu",
        "loss_scale",
        "skipped_steps",
        "eval_loss",
        "kl",
    }
    assert trained[0]["rewards/margins"] == pytest.approx(0, abs=1e-4), "the reference is the start"
    assert trained[-1]["rewards/accuracies"] == 1 and trained[-1]["loss"] < 0.8 * trained[0]["loss"]
    assert lines[-1]["eval_rewards/accuracies"] == 1 and lines[-1]["eval_nll_loss"] > 0


@pytest.mark.parametrize("precompute", ["false", "true"])
def test_goes_on(precompute: str, run: Any, tmp_path: Path) -> None:
    """The reference stays the model as training began."""
    flags = {"save_steps": 2, "rpo_alpha": 0.1, "precompute_ref_log_probs": precompute}
    whole = run(megatron_dpo_main, "run", **flags)
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("2")  # as if it had been killed in step 3
    again = run(megatron_dpo_main, "run", **flags)
    for name in ("step", "loss", "grad_norm", *REWARDS):
        assert values(again, name) == values(whole, name), name
    assert whole[-1]["rewards/margins"] > 0.1


@pytest.mark.parametrize("family", ["qwen3", "glm4_moe"])
def test_bf16_policy_and_reference_begin_equal(family: str, run: Any) -> None:
    (line,) = run(megatron_dpo_main, "run", family, torch_dtype="bfloat16", train_iters=1)
    assert line["rewards/chosen"] == line["rewards/rejected"] == 0


def test_the_names_that_ms_swift_users_type(run: Any) -> None:
    _, dpo, _ = find_route(["megatron", "dpo"])
    _, rlhf, _ = find_route(["megatron", "rlhf"])
    assert dpo == rlhf
    flags = {"rlhf_type": "dpo", "calculate_per_token_loss": "false", "train_iters": 1}
    assert len(run(megatron_dpo_main, "run", **flags)) == 1
    for flag, value, words in (
        ("mcore_ref_model", "DIR", "either format"), ("mtp_num_layers", 1, "no multi-token-prediction"),
        ("calculate_per_token_loss", "true", "averaged over the global batch"), ("streaming", "true", "not available"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            run(megatron_dpo_main, "other", **{flag: value})
