"""Embedding models and rerankers on Megatron in one process: against `sft` with transformers, and saved in every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from swiftlite.cli.main import main as swiftlite_main
from swiftlite.llm.infer import infer_main
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.utils.errors import UsageError
from tests.megatron.conftest import values

LORA = {"train_type": "lora", "lora_rank": 4, "lora_dropout": 0, "lr": 2e-3}
TEXTS = ["It is good for 3 things", "No 4.", "What is number 7 good for?"]
WORDS = {"generative_reranker_positive_token": "y", "generative_reranker_negative_token": "n", "max_length": 400}
RANKED = [
    {"query": f"what is {i}", "pos": f"It is number {i} of things",
     "neg": ["the fox", "the dog sleeps " * (i % 3 + 1)][: 1 + i % 2]} for i in range(12)
]  # fmt: skip
# The last letters of texts differ, and so do their vectors.
NAMES = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima".split()
TRIPLETS = [
    {"anchor": f"Who is number {i}? {name}", "positive": "It is" + " really" * (i % 3) + f" {NAMES[5 * i % 12]}",
     "negative": f"{NAMES[i - 5]}"} for i, name in enumerate(NAMES)
]  # fmt: skip
PAIRS = [
    {"sentence1": f"one text of {i}", "sentence2": "another one" + " of it" * i, "label": i % 2} for i in range(12)
]

# What is trained, rows, flags.
EMBEDDING = {"task_type": "embedding", "lr": 3e-4}
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "reranker": (RANKED, {"task_type": "reranker", "padding_free": "true"}),
    "reranker-lora": (RANKED, {"task_type": "reranker", "loss_type": "listwise_reranker", **LORA}),
    "generative": (RANKED, {"task_type": "generative_reranker", **WORDS}),
    "generative-lora": (
        RANKED, {"task_type": "generative_reranker", "loss_type": "listwise_reranker", **WORDS, **LORA, "lr": 1e-3},
    ),
    "embedding": (TRIPLETS, EMBEDDING),
    "embedding-lora": (TRIPLETS, {**EMBEDDING, "padding_free": "true", **LORA, "lr": 1e-3}),
    "embedding-online": (PAIRS, {**EMBEDDING, "loss_type": "online_contrastive"}),
}  # fmt: skip
METRICS = ("loss", "grad_norm", "lr", "accuracy", "margin", "top1", "mrr", "positive", "negative")


@pytest.mark.parametrize("name", KINDS)
def test_equal_to_transformers(name: str, train: Any) -> None:
    """Losses, gradients and metrics of 8 steps in fp32, and of evaluations whose last batch is not full."""
    rows, flags = KINDS[name]
    flags = {"train_iters": 8, "save_weights_only": "true", "split_dataset_ratio": 0.4, "eval_steps": 4, **flags}
    theirs, ours = (train(main, main.__name__, rows, **flags) for main in (sft_main, megatron_sft_main))
    assert [line["step"] for line in theirs] == [line["step"] for line in ours]
    compared = {n for line in theirs for n in line if n in METRICS or n.startswith("eval_")}
    assert compared >= {"loss", "grad_norm", "eval_loss", "accuracy", "margin", "eval_margin"}
    for metric in compared:
        assert values(ours, metric) == pytest.approx(values(theirs, metric), rel=1e-5, abs=1e-5), metric
    losses = values(ours, "loss")
    assert sum(losses[-3:]) < sum(losses[:3])


def vectors_of(directory: Path) -> torch.Tensor:
    """[texts, D] by sentence-transformers."""
    found = pytest.importorskip("sentence_transformers.sentence_transformer")
    encoder = found.SentenceTransformer(str(directory), device="cpu")
    vectors: torch.Tensor = encoder.encode(TEXTS, convert_to_tensor=True)
    return vectors


def export(*words: object) -> None:
    assert swiftlite_main(["export", *map(str, words)]) == 0


def test_an_embedding_model_is_saved(train: Any, tmp_path: Path) -> None:
    """sentence-transformers reads it, from either side alike; it goes both ways bit for bit and is trained on."""
    flags = {"train_iters": 4, **EMBEDDING}
    train(sft_main, "hf", TRIPLETS, **flags)
    lines = train(megatron_sft_main, "run", TRIPLETS, save_safetensors="true", **flags)
    saved, theirs = tmp_path / "run/iter_0000004-hf", tmp_path / "hf/checkpoint-4"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    assert json.loads((theirs / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    torch.testing.assert_close(vectors_of(saved), vectors_of(theirs), rtol=0, atol=1e-5)
    export("--mcore_model", tmp_path / "run", "--to_hf", "true", "--output_dir", tmp_path / "back")
    assert (tmp_path / "back/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert torch.equal(vectors_of(tmp_path / "back"), vectors_of(saved))
    again = [
        train(megatron_sft_main, name, TRIPLETS, **{**flags, "train_iters": 1, "model": None, **where})[0]["loss"]
        for name, where in (
            ("one", {"model": saved}),
            ("two", {"mcore_model": tmp_path / "run"}),
            ("three", {"model": theirs}),
        )
    ]
    assert again[0] == again[1] == pytest.approx(again[2], rel=1e-5) and again[0] < lines[0]["loss"]
    with pytest.raises(UsageError, match="is a model of --task_type embedding; add that"):
        train(megatron_sft_main, "other", TRIPLETS, model=saved)
    (saved / "args.json").unlink()
    with pytest.raises(UsageError, match="is a model of --task_type embedding"):
        infer_main(["--model", str(saved), "--prompt", "x"])


def test_adapters_of_an_embedding_model(train: Any, tmp_path: Path, model_of: Callable[..., Path]) -> None:
    """sentence-transformers reads them as they are, as those of the other side; they go to Megatron and back, and merge."""
    flags = {"train_iters": 4, **EMBEDDING, **LORA}
    train(sft_main, "hf", TRIPLETS, **flags)
    train(megatron_sft_main, "run", TRIPLETS, merge_lora="true", **flags)
    adapter, theirs = tmp_path / "run/iter_0000004", tmp_path / "hf/checkpoint-4"
    ours, others = (load_file(path / "adapter_model.safetensors") for path in (adapter, theirs))
    assert ours.keys() == others.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], others[name], rtol=0, atol=1e-5)
    vectors = vectors_of(tmp_path / "run/iter_0000004-hf")
    if int(transformers.__version__.split(".")[0]) >= 5:  # before, AutoProcessor reads no adapter
        for path in (adapter, theirs):
            torch.testing.assert_close(vectors_of(path), vectors, rtol=0, atol=1e-5)
    common = ["--model", model_of("qwen3"), "--output_dir"]
    export(*common, tmp_path / "merged", "--adapters", adapter, "--merge_lora", "true")
    torch.testing.assert_close(vectors, vectors_of(tmp_path / "merged"), rtol=0, atol=1e-5)
    further = [
        train(megatron_sft_main, name, TRIPLETS, **{**flags, "train_iters": 1}, adapters=start)[0]["loss"]
        for name, start in (("ours", adapter), ("theirs", theirs))
    ]
    assert further[0] == pytest.approx(further[1], rel=1e-5)


def test_a_model_that_was_saved_without_its_output_layer(
    train: Any, tmp_path: Path, model_of: Callable[..., Path]
) -> None:
    """As Qwen3-Embedding's files are: bare names, and a config.json that speaks of a model that writes text."""
    base = model_of("qwen3", tie_word_embeddings=False)
    bare = tmp_path / "bare"
    shutil.copytree(base, bare)
    (bare / "model.safetensors").unlink()
    AutoModel.from_pretrained(base).save_pretrained(bare)
    (bare / "config.json").write_text((base / "config.json").read_text())
    assert "embed_tokens.weight" in load_file(bare / "model.safetensors")
    flags = {"train_iters": 3, **EMBEDDING}
    wanted, found, theirs = (
        values(train(main, name, TRIPLETS, **flags, model=model), "loss")
        for main, name, model in (
            (megatron_sft_main, "whole", base), (megatron_sft_main, "bare-run", bare), (sft_main, "hf", bare),
        )
    )  # fmt: skip
    assert found == wanted == pytest.approx(theirs, rel=1e-5)
    export("--model", bare, "--to_mcore", "true", "--output_dir", tmp_path / "mcore")
    export("--mcore_model", tmp_path / "mcore", "--to_hf", "true", "--output_dir", tmp_path / "back")
    one, two = (AutoModel.from_pretrained(path).state_dict() for path in (bare, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(UsageError, match="has no output layer, so it writes no text"):
        train(megatron_sft_main, "text", [{"query": "q", "response": "r"}], model=bare)


@pytest.mark.parametrize("kind", ["reranker", "generative_reranker"])
def test_a_reranker_answers_in_infer(kind: str, train: Any, tmp_path: Path) -> None:
    """The Hugging Face directory of a checkpoint ranks what it was trained on, as does what is exported later."""
    flags = {"task_type": kind, **(WORDS if kind != "reranker" else {})}
    train(megatron_sft_main, "run", RANKED, train_iters=8, save_safetensors="true", **flags)
    export("--mcore_model", tmp_path / "run", "--to_hf", "true", "--output_dir", tmp_path / "back")
    found = []
    for directory in (tmp_path / "run/iter_0000008-hf", tmp_path / "back"):
        result = tmp_path / f"{len(found)}.jsonl"
        words = [directory, "--val_dataset", tmp_path / "data.jsonl", "--result_path", result, "--max_length", 400]
        assert swiftlite_main(["infer", "--model", *map(str, words)]) == 0
        found.append([json.loads(line)["response"] for line in result.read_text().splitlines()])
    assert found[0] == found[1] and [len(scores) for scores in found[0]] == [2 + i % 2 for i in range(12)]
    assert sum(scores[0] > max(scores[1:]) for scores in found[0]) >= 10
    if kind == "generative_reranker":
        AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        assert AutoTokenizer.from_pretrained(tmp_path / "back")
