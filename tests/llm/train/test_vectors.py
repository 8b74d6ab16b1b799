"""Embedding models and rerankers train as sentence-transformers' trainers do, and it loads what is saved."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import normalize

from swiftlite.checkpoint.sentence import write_sentence_files
from swiftlite.cli.export import export_main
from swiftlite.llm.dataset.group_rows import group_row
from swiftlite.llm.dataset.groups import GroupDataset, Grouping, judged, parts_of
from swiftlite.llm.infer import infer_main
from swiftlite.llm.template import get_template
from swiftlite.llm.train.grouped import Embedding, GenerativeReranker, GroupCollator
from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.train.schedule import build_optimizer
from swiftlite.train.vector_loss import VectorLoss
from swiftlite.utils.errors import UsageError
from swiftlite.weights.head import initial_head
from tests.rows import CHAT

sentence_transformers = pytest.importorskip("sentence_transformers.sentence_transformer")

STEPS, BATCH, RATE = 20, 4, 5e-5
TEXTS = [f"the lazy {animal} {does}" for animal in ("dog", "fox", "cat") for does in ("jumps", "sleeps over it", "is")]
TRIPLETS = [
    {"anchor": f"What is number {i} good for?", "positive": f"It is good for {i} things" + " at once" * (i % 3),
     "negative": f"No {i}."} for i in range(12)
]  # fmt: skip
PAIRS = [
    {"sentence1": f"one text of {i}", "sentence2": "another one" + " of it" * i, "score": (i % 5) / 4}
    for i in range(12)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(**flags: object) -> None:
    base = {
        "torch_dtype": "float32", "model_type": "qwen3", "lr": RATE, "micro_batch_size": BATCH, "global_batch_size": BATCH,
        "lr_decay_style": "constant", "adam_eps": 1e-5, "logging_steps": 1, "report_to": "none", "dataset_shuffle": "false",
        "save_weights_only": "true",
    }  # fmt: skip
    sft_main([word for name, value in {**base, **flags}.items() for word in (f"--{name}", str(value))])


def as_sentence_transformer(directory: Path, copy: Path) -> Any:
    """A checkpoint of a model that writes text, as sentence-transformers takes it with our files next to it."""
    shutil.copytree(directory, copy)
    write_sentence_files(directory, copy, json.loads((copy / "config.json").read_text())["hidden_size"], 64)
    return sentence_transformers.SentenceTransformer(str(copy), device="cpu")


def their_run(
    model: Any, loss: Any, rows: list[dict[str, Any]], output: Path, kind: str = "SentenceTransformer"
) -> list[dict[str, float]]:
    """Log lines of SentenceTransformerTrainer, or CrossEncoderTrainer, on rows in their order, with our optimizer."""
    from datasets import Dataset
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    def in_order(dataset: Any, **options: Any) -> Any:
        return DefaultBatchSampler(SequentialSampler(dataset), **options)

    theirs = importlib.import_module("sentence_transformers")
    args = getattr(theirs, f"{kind}TrainingArguments")(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, logging_steps=1,
        lr_scheduler_type="constant", max_grad_norm=1.0, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        batch_sampler=in_order,
    )  # fmt: skip
    adam = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-5, "optim": "adamw_torch", "loraplus_lr_ratio": None}
    optimizer = build_optimizer(model, SimpleNamespace(weight_decay=0.1, lr=RATE, **adam))  # type: ignore[arg-type]
    trainer = getattr(theirs, f"{kind}Trainer")(
        model=model, args=args, train_dataset=Dataset.from_list(rows), loss=loss,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


LOSSES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "infonce": ("MultipleNegativesRankingLoss", {"scale": 5}, TRIPLETS, {"infonce_temperature": 0.2}),
    "cosine_similarity": ("CosineSimilarityLoss", {}, PAIRS, {}),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_to_sentence_transformers(loss: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """fp32, 20 steps: loss and gradient norm within 1e-5, the loss falls; the saved model gives the vectors of theirs."""
    from sentence_transformers.sentence_transformer import losses

    name, options, rows, flags = LOSSES[loss]
    base = tiny_model("qwen3")
    data = write(tmp_path / "data.jsonl", rows)
    train(model=base, task_type="embedding", loss_type=loss, dataset=data, output_dir=tmp_path / "ours",
          train_iters=STEPS, max_length=64, **flags)  # fmt: skip
    model = as_sentence_transformer(base, tmp_path / "theirs")
    before = model.encode(TEXTS, convert_to_tensor=True)
    wanted = their_run(model, getattr(losses, name)(model, **options), rows, tmp_path / "run")
    mine = read_run(tmp_path / "ours/logging.jsonl")
    assert len(mine) == len(wanted) == STEPS
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in mine] == pytest.approx([line[key] for line in wanted], rel=1e-5, abs=1e-6)
    assert sum(line["loss"] for line in mine[-3:]) < sum(line["loss"] for line in mine[:3])
    saved = sentence_transformers.SentenceTransformer(str(tmp_path / f"ours/checkpoint-{STEPS}"), device="cpu")
    found, after = (each.encode(TEXTS, convert_to_tensor=True) for each in (saved, model))
    torch.testing.assert_close(found, after, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_batches_of_any_layout(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Vectors and scores are those of each text alone: padded right, left, joined; and those of sentence-transformers."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    directory = tiny_model("qwen3")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT
    rows = [
        group_row({"query": f"q {i}", "pos": "yes it is " * (i + 1), "neg": ["no", "never mind"]}) for i in range(3)
    ]
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    writer = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for each in (model, writer):
        each.config.use_cache = False  # as training does: a cache hides where joined texts begin
    encoder = as_sentence_transformer(directory, tmp_path / "theirs")
    yes, no = tokenizer.convert_tokens_to_ids(["y", "n"])
    for options in ({}, {"padding_side": "left"}, {"padding_free": True}):
        template = get_template("chatml", tokenizer, use_chat_template=False, pooled=True, **options)
        dataset = GroupDataset(rows, template, Grouping("embedding", "infonce"))
        batch = GroupCollator(template, "embedding")(list(dataset))
        inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
        vectors = normalize(model(**inputs).last_hidden_state.flatten(0, 1)[batch["pooled"]], dim=-1)
        texts = [text for i in range(3) for text in (f"q {i}", "yes it is " * (i + 1), "no", "never mind")]
        torch.testing.assert_close(vectors.detach(), encoder.encode(texts, convert_to_tensor=True), rtol=0, atol=1e-5)
        sums = Embedding(VectorLoss()).sums(model, batch)
        assert sums["rows"] == 3 and batch["groups"].tolist() == [i for i in range(3) for _ in range(4)]
        template = get_template("chatml", tokenizer, template_backend="jinja", pooled=True, **options)
        asked = GroupDataset(rows, template, Grouping("generative_reranker", "listwise_reranker"))
        batch = GroupCollator(template, "generative_reranker")(list(asked))
        scores = GenerativeReranker(RankingLoss("listwise_reranker"), yes, no).scores(writer, batch)
        for score, ids in zip(scores, [ids for item in asked for ids in parts_of(item)], strict=True):
            logits = writer(input_ids=torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(score, logits[yes] - logits[no], rtol=0, atol=1e-5)
        question = judged(rows[0]["messages"], rows[0]["negative_messages"][0])
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
        assert parts_of(asked[0])[1] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="AutoProcessor of transformers 4 reads no adapter"
)
def test_lora(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """sentence-transformers loads the adapter as it is, and merged; both give what peft gives."""
    base = tiny_model("qwen3")
    data = write(tmp_path / "data.jsonl", TRIPLETS)
    train(model=base, task_type="embedding", dataset=data, output_dir=tmp_path / "run", train_iters=3, train_type="lora",
          lora_rank=4, lr=1e-2, max_length=64)  # fmt: skip
    last = tmp_path / "run/checkpoint-3"
    assert json.loads((last / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    export_main(["--adapters", str(last), "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")])
    models = (
        sentence_transformers.SentenceTransformer(str(path), device="cpu") for path in (last, tmp_path / "merged")
    )
    adapted, merged = (model.encode(TEXTS, convert_to_tensor=True) for model in models)
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-5)
    started = as_sentence_transformer(base, tmp_path / "base").encode(TEXTS, convert_to_tensor=True)
    assert (adapted - started).abs().max() > 1e-2


JUDGED = [
    {"query": f"what is {i}", "pos": f"number {i}" if i % 2 else "the lazy fox" + " jumps" * (i % 5), "label": i % 2}
    for i in range(12)
]


def test_reranker_equals_a_cross_encoder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Plain text, fp32, 20 steps: as CrossEncoderTrainer; what is saved gives its scores, and `infer` the same."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tiny_model("qwen3")
    data = write(tmp_path / "data.jsonl", JUDGED)
    train(model=base, task_type="reranker", use_chat_template="false", dataset=data, output_dir=tmp_path / "ours",
          train_iters=STEPS, max_length=64)  # fmt: skip
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0, dtype=torch.float32)
    start.score.weight.data.copy_(initial_head(1, start.config.hidden_size, start.config.initializer_range, 42))
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "start")
    theirs = CrossEncoder(str(tmp_path / "start"), device="cpu", max_length=64)
    rows = [{"query": row["query"], "document": row["pos"], "label": float(row["label"])} for row in JUDGED]  # type: ignore[arg-type]
    wanted = their_run(theirs, BinaryCrossEntropyLoss(theirs), rows, tmp_path / "run", "CrossEncoder")
    mine = read_run(tmp_path / "ours/logging.jsonl")
    assert len(mine) == len(wanted) == STEPS
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in mine] == pytest.approx([line[key] for line in wanted], rel=1e-5, abs=1e-6)
    assert sum(line["loss"] for line in mine[-3:]) < sum(line["loss"] for line in mine[:3])
    saved = tmp_path / f"ours/checkpoint-{STEPS}"
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["Qwen3ForSequenceClassification"]
    pairs = [(row["query"], row["document"]) for row in rows]
    found, after = (
        each.predict(pairs, activation_fn=torch.nn.Identity())
        for each in (CrossEncoder(str(saved), device="cpu"), theirs)
    )
    assert found == pytest.approx(after, rel=0, abs=1e-5)
    infer_main(["--model", str(saved), "--val_dataset", str(data), "--result_path", str(tmp_path / "scores.jsonl")])
    said = [json.loads(line)["response"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [scores for (scores,) in said] == pytest.approx(found, rel=0, abs=1e-5)


def test_reranker_of_conversations(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA with its head, groups, joined samples: `infer` ranks, and the merged model says the same in transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = tiny_model("qwen3")
    rows = [{"query": f"q {i}", "pos": f"number {i}", "neg": ["the fox", "the dog"]} for i in range(8)]
    data = write(tmp_path / "data.jsonl", [*rows, {"query": "alone"}])
    train(model=base, task_type="reranker", loss_type="listwise_reranker", template="chatml", dataset=data,
          max_drop_ratio=0.2, output_dir=tmp_path / "run", train_iters=12, lr=1e-2, train_type="lora", lora_rank=4,
          padding_free="true")  # fmt: skip
    lines = read_run(tmp_path / "run/logging.jsonl")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"] and lines[-1]["top1"] == 1.0
    adapter = tmp_path / "run/checkpoint-12"
    export_main(["--adapters", str(adapter), "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")])
    said = []
    for words in (["--adapters", str(adapter)], ["--model", str(tmp_path / "merged")]):
        result = tmp_path / f"{len(said)}.jsonl"
        infer_main([*words, "--val_dataset", str(data), "--result_path", str(result), "--max_batch_size", "4"])
        *answered, unanswered = map(json.loads, result.read_text().splitlines())
        assert unanswered["response"] is None and "no document" in unanswered["error"]
        said.append([line["response"] for line in answered])
    assert all(len(scores) == 3 and scores[0] > max(scores[1:]) for scores in said[0])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = get_template("chatml", tokenizer, pooled=True)
    read = template.encode(
        {"messages": [{"role": "user", "content": "q 0"}, {"role": "assistant", "content": "number 0"}]}
    )
    score = model(torch.tensor([read["input_ids"]])).logits.item()
    assert [said[0][0][0], said[1][0][0]] == pytest.approx([score, score], abs=1e-5)
    with pytest.raises(UsageError, match="scores documents and does not chat"):
        infer_main(["--model", str(tmp_path / "merged"), "--prompt", "q 0"])


def test_generative_reranker(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Learns which documents answer; evaluation counts a last, smaller batch; what is saved writes text as before."""
    from transformers import AutoModelForCausalLM

    rows = [{"query": f"q {i}", "pos": f"number {i}", "neg": ["the fox", "the dog"]} for i in range(8)]
    data = write(tmp_path / "data.jsonl", rows)
    val = write(tmp_path / "val.jsonl", rows[:5])
    train(model=tiny_model("qwen3"), task_type="generative_reranker", loss_type="listwise_reranker", template="chatml",
          dataset=data, val_dataset=val, output_dir=tmp_path / "run", train_iters=8, lr=1e-3, eval_steps=8,
          generative_reranker_positive_token="y", generative_reranker_negative_token="n")  # fmt: skip
    lines = read_run(tmp_path / "run/logging.jsonl")
    assert lines[7]["loss"] < 0.5 * lines[0]["loss"]
    evaluated = next(line for line in lines if "eval_loss" in line)
    assert evaluated["eval_top1"] == 1.0 and evaluated["eval_mrr"] == 1.0
    saved, result = tmp_path / "run/checkpoint-8", tmp_path / "scores.jsonl"
    AutoModelForCausalLM.from_pretrained(saved)
    infer_main(["--model", str(saved), "--val_dataset", str(val), "--result_path", str(result)])
    for line in map(json.loads, result.read_text().splitlines()):
        assert len(line["response"]) == 3 and line["response"][0] > max(line["response"][1:])
    with pytest.raises(UsageError, match="generative_reranker_positive_token surely: is .* tokens"):
        train(model=tiny_model("qwen3"), task_type="generative_reranker", template="chatml", dataset=data,
              output_dir=tmp_path / "none", generative_reranker_positive_token="surely")  # fmt: skip
