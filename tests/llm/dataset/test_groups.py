"""Rows of texts that belong together: forms that others write, groups as token ids, what is dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.llm.dataset.group_rows import group_row, text_of
from swiftlite.llm.dataset.groups import GroupDataset, Grouping, answered, judged, parts_of
from swiftlite.llm.dataset.loader import PlacedRow
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.store import TokenStore
from swiftlite.llm.template import get_template
from swiftlite.utils.errors import DatasetError

INFONCE = Grouping("embedding", "infonce")


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


# What ms-swift, sentence-transformers, FlagEmbedding and MTEB write -> (query, positives, negatives, label).
FORMS: list[tuple[dict[str, Any], tuple[str, list[str], list[str], float | None]]] = [
    ({"messages": said("user", "q"), "positive_messages": [said("user", "p")], "negative_messages": [said("user", "n")]},
     ("q", ["p"], ["n"], None)),
    ({"messages": said("user", "q"), "positive_messages": said("user", "p"), "label": 0.8}, ("q", ["p"], [], 0.8)),
    ({"messages": [*said("system", "Find it."), *said("user", "q")], "positive_messages": [said("user", "p")]},
     ("Find it. q", ["p"], [], None)),
    ({"query": "q", "response": "p", "rejected_response": ["n", "m"]}, ("q", ["p"], ["n", "m"], None)),
    ({"query": "q", "response": "p", "rejected_response": "n", "system": "s"}, ("s q", ["p"], ["n"], None)),
    ({"messages": [*said("user", "q"), *said("assistant", "p")], "rejected_messages": said("assistant", "n")},
     ("q", ["p"], ["n"], None)),
    ({"anchor": "q", "positive": "p", "negative": "n"}, ("q", ["p"], ["n"], None)),
    ({"anchor": "q", "positive": "p", "negative_2": "m", "negative_1": "n", "negative_10": "o"},
     ("q", ["p"], ["n", "m", "o"], None)),
    ({"sentence1": "q", "sentence2": "p", "score": "0.25"}, ("q", ["p"], [], 0.25)),
    ({"sentence_A": "q", "sentence_B": "p", "label": True}, ("q", ["p"], [], 1.0)),
    ({"query": "q", "pos": ["p", "r"], "neg": ["n"]}, ("q", ["p", "r"], ["n"], None)),
    ({"question": "q", "answer": "p", "label": None}, ("q", ["p"], [], None)),
]  # fmt: skip


@pytest.mark.parametrize("row, wanted", FORMS)
def test_forms(row: dict[str, Any], wanted: tuple[Any, ...]) -> None:
    found = group_row(row)
    texts = [[text_of(document) for document in found[f"{kind}_messages"]] for kind in ("positive", "negative")]
    assert (text_of(found["messages"]), *texts, found.get("label")) == wanted


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"query": "q"}, "no positive"),
        ({"query": "q", "positive": []}, "no positive"),
        ({"query": "q", "positive": " "}, "a positive is empty"),
        ({"query": "q", "positive": "p", "negative": ["n", ""]}, "a negative is empty"),
        ({"query": " ", "positive": "p"}, "the query is empty"),
        ({"query": "q", "positive": 3}, "positive is not text"),
        ({"query": "q", "positive": "p", "label": "near"}, "label is not a number"),
        ({"a": "q", "b": "p"}, "no known format"),
        ({"query": "q", "positive": "p", "positive_images": [["a.png"]]},
         "has images, video or sound, which are not trained on"),
        ("q", "not an object"),
    ],
)  # fmt: skip
def test_rows_of_no_form(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        group_row(row)
    assert error.value.reason == reason


@pytest.fixture
def make_template(tiny_tokenizer_dir: Path) -> Callable[..., Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    return lambda **options: get_template("chatml", tokenizer, **options)


def rows(*given: dict[str, Any]) -> list[Any]:
    return [PlacedRow(group_row(row), f"data.jsonl:{number}") for number, row in enumerate(given, 1)]


def test_texts_are_encoded_as_the_tokenizer_does(make_template: Callable[..., Any]) -> None:
    """With the tokens that it adds itself, one after the other; kept in a store and taken apart again."""
    from tokenizers.processors import TemplateProcessing

    template = make_template()
    tokenizer = template.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))]
    )
    texts = ["The quick brown fox.", "A fox that is quick.", "A dog.", "The lazy dog."]
    dataset = GroupDataset(rows({"query": texts[0], "pos": texts[1], "neg": texts[2:]}), template, INFONCE)
    assert parts_of(dataset[0]) == tokenizer(texts)["input_ids"]
    assert all(ids[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>") for ids in parts_of(dataset[0]))
    assert dataset.lengths == [dataset[0]["length"]] == [len(dataset[0]["input_ids"])]
    cut = GroupDataset(rows({"query": texts[0], "pos": texts[1]}), make_template(max_length=3, truncation_strategy="right"),
                       INFONCE)  # fmt: skip
    assert parts_of(cut[0]) == tokenizer(texts[:2], truncation=True, max_length=3)["input_ids"]
    assert parts_of(cut[0])[0][-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_what_is_dropped(make_template: Callable[..., Any], tmp_path: Path) -> None:
    """Each bad row has its reason; a row that a dataset repeats on purpose is none."""
    good = rows(
        {"query": "a", "pos": "b"},
        {"query": "a", "pos": "b"},
        {"query": "c", "pos": "c"},
        {"query": "c", "pos": "d", "neg": ["d"]},
        {"query": "c", "pos": "d", "score": 0.3},
        {"query": "e", "pos": "long " * 50},
        {"query": "f", "pos": "g", "score": 1},
    )
    dataset = GroupDataset([*good, good[0]], make_template(max_length=40), INFONCE, max_drop_ratio=0.9)
    assert dataset.report.reasons == {
        "the same pair twice": 1, "two texts of a group are the same": 2, "a label that is not 1": 1,
        "longer than --max_length": 1,
    }  # fmt: skip
    assert "data.jsonl:2 as data.jsonl:1" in dataset.report.examples["the same pair twice"]
    assert len(dataset) == 3
    dataset.store.save(tmp_path / "store")
    loaded = GroupDataset.of(TokenStore.load(tmp_path / "store"), "embedding")
    assert list(loaded) == list(dataset) and loaded.content_hash() == dataset.content_hash()
    with pytest.raises(DatasetError, match="no label"):
        GroupDataset(good[:1], make_template(), Grouping("embedding", "cosine_similarity"))
    with pytest.raises(DatasetError, match="neither 0 nor 1.*0.3"):
        GroupDataset(good[4:5], make_template(), Grouping("embedding", "contrastive"))
    with pytest.raises(DatasetError, match="no negative"):
        GroupDataset(good[:1], make_template(), Grouping("reranker", "listwise_reranker"))


def test_several_positives_and_many_negatives() -> None:
    """A group for each positive; choices are by seed, and the same each time."""
    row = group_row({"query": "q", "pos": ["p1", "p2", "p3"], "neg": [f"n{i}" for i in range(9)]})
    grouping = Grouping("embedding", "infonce", max_positives=2, max_negatives=3, seed=1)
    groups = grouping.groups(row, 4)
    texts = [[text_of(sample["messages"]) for sample in group.samples] for group in groups]
    assert len(texts) == 2 and texts[0][1] != texts[1][1] and texts[0][2:] == texts[1][2:] and len(texts[0]) == 5
    assert groups == grouping.groups(row, 4) != grouping.groups(row, 5)
    ranked = Grouping("reranker", "pointwise_reranker", max_negatives=2).groups(row, 0)
    assert [group.facts for group in ranked] == [{"relevant": [1.0, 0.0, 0.0]}]
    judged_row = group_row({"query": "q", "response": "p", "label": 0})
    assert Grouping("reranker", "pointwise_reranker").groups(judged_row, 0)[0].facts == {"relevant": [0.0]}


def test_questions_of_rerankers(make_template: Callable[..., Any]) -> None:
    """The classifying one reads a conversation; the generative one Qwen3-Reranker's question, with its own instruction."""
    query = [*said("system", "In general."), *said("user", "What is it?")]
    assert answered(query, said("user", "This.")) == [*query, *said("assistant", "This.")]
    document = [*said("system", "In this case."), *said("user", "This.")]
    assert answered(query, document)[0] == document[0]
    asked = judged(said("user", "What is it?"), said("user", "This."))[1]["content"]
    assert asked == (
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: What is it?\n"
        "<Document>: This."
    )
    assert "<Instruct>: In this case.\n" in judged(query, document)[1]["content"]
    assert "<Instruct>: In general.\n" in judged(query, said("user", "This."))[1]["content"]
    dataset = GroupDataset(
        rows({"query": "q", "pos": "p", "neg": ["n"]}), make_template(), Grouping("reranker", "listwise_reranker")
    )
    template = make_template()
    assert parts_of(dataset[0]) == [
        template.encode({"messages": answered(said("user", "q"), said("assistant", text))})["input_ids"]
        for text in "pn"
    ]
