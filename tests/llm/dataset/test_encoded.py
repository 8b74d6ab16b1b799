"""EncodedDataset: what encode gives, in order, with a report of what was left out."""

from __future__ import annotations

import json
import os
import signal

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.llm.dataset import EncodedDataset, load_dataset
from swiftlite.llm.dataset.encoded import RowEncoder
from swiftlite.llm.template import get_template
from swiftlite.utils.errors import DatasetError


def row(i, answer="an answer"):
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def make_template(tiny_tokenizer_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    return lambda **kwargs: get_template("chatml", tokenizer, **kwargs)


def test_items_are_what_encode_gives(make_template):
    template = make_template()
    rows = [row(i) for i in range(600)]
    rows[3]["messages"][1]["loss_scale"] = 0.5
    dataset = EncodedDataset(rows, template)
    assert len(dataset) == 600
    for i in (0, 3, 255, 256, 599):
        assert dataset[i] == template.encode(rows[i])
        assert dataset.lengths[i] == dataset[i]["length"]
    assert set(dataset[3]["loss_scale"]) == {0.0, 0.5}
    assert [item["length"] for item in dataset] == dataset.lengths
    assert dataset.report.summary() == "all 600 rows used"
    with pytest.raises(IndexError):
        dataset[600]


def test_left_out_rows_are_reported(make_template):
    rows = [row(i) for i in range(40)]
    rows[5] = row(5, "long " * 200)
    rows[7] = {"messages": [{"role": "user", "content": "no answer"}]}
    rows[9] = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}
    template = make_template(max_length=100)
    dataset = EncodedDataset(rows, template, max_drop_ratio=0.1)
    assert len(dataset) == 37 and dataset.report.dropped == 3
    assert dataset.row_indices == [i for i in range(40) if i not in (5, 7, 9)]
    assert dataset.report.reasons == {
        "longer than --max_length": 1,
        "no assistant text with a loss": 1,
        "cannot be encoded": 1,
    }
    assert "row 5" in dataset.report.summary() and "row 9" in dataset.report.summary()
    with pytest.raises(DatasetError, match=r"3 of 40 rows dropped.*--max_drop_ratio 0.05"):
        EncodedDataset(rows, template)


def test_several_processes_give_the_same_and_a_killed_one_is_told(make_template):
    template = make_template()
    rows = [row(i) for i in range(3000)]
    with RowEncoder(template, 2) as encode:
        found = [{name: list(value) for name, value in item.items() if name == "labels"} for item in encode(rows)]
        assert found == [{"labels": item["labels"]} for item in RowEncoder(template)(rows)]
        again = encode(rows)
        next(again)
        os.kill(encode._children[0].process.pid, signal.SIGKILL)
        with pytest.raises(DatasetError, match="--dataset_num_proc 2: a process that tokenises was killed"):
            list(again)


def test_callers_may_take_turns_and_leave_early(make_template):
    template = make_template()
    rows = [row(i) for i in range(600)]
    wanted = [item["labels"] for item in RowEncoder(template)(rows)]
    with RowEncoder(template, 2) as encode:
        next(encode(rows))  # what is left of it is nobody's
        pairs = zip(encode(rows), encode(rows), strict=True)
        assert [(list(a["labels"]), list(b["labels"])) for a, b in pairs] == [(labels, labels) for labels in wanted]


def test_nothing_left(make_template):
    with pytest.raises(DatasetError, match="no row is left"):
        EncodedDataset([row(0)], make_template(max_length=3), max_drop_ratio=1.0)
    with pytest.raises(DatasetError, match="no rows"):
        EncodedDataset([], make_template())


def test_truncation_keeps_rows(make_template):
    dataset = EncodedDataset([row(0, "long " * 200)], make_template(max_length=50, truncation_strategy="right"))
    assert dataset.lengths == [50]


@pytest.fixture
def tokenised(monkeypatch):
    """Characters of the texts that the tokenizer was given, one entry a call."""
    seen = []

    class Counting:
        def __init__(self, backend):
            vars(self)["backend"] = backend

        def __getattr__(self, name):
            return getattr(self.backend, name)

        def __setattr__(self, name, value):
            setattr(self.backend, name, value)

        def encode_batch(self, texts, **kwargs):
            seen.append(sum(map(len, texts)))
            return self.backend.encode_batch(texts, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", property(lambda self: Counting(self._tokenizer)))
    return seen


def test_a_huge_row_is_dropped_before_it_is_tokenised(make_template, tokenised, monkeypatch):
    monkeypatch.setattr("swiftlite.llm.template.limits._CHARS_AT_ONCE", 20_000)
    monkeypatch.setattr("swiftlite.llm.template.limits.MAX_CHARS", 300_000)
    rows = [row(i, "word " * 200) for i in range(40)]
    rows[5], rows[7] = row(5, "a" * 200_000), row(7, "b" * 400_000)
    dataset = EncodedDataset(rows, make_template(max_length=2000), max_drop_ratio=0.1)
    assert len(dataset) == 38 and max(tokenised) < 25_000 and sum(tokenised) < 50_000
    assert dataset.report.examples["longer than --max_length"][0].startswith("row 5 2000")
    tokenised.clear()
    dataset = EncodedDataset(rows, make_template(max_length=2000, truncation_strategy="split"), max_drop_ratio=0.1)
    assert dataset.row_indices.count(5) > 20 and 7 not in dataset.row_indices and max(tokenised) < 250_000
    assert "characters are more than 300,000" in dataset.report.examples["cannot be encoded"][0]


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_a_huge_row_is_cut_as_if_it_were_tokenised_whole(make_template, tokenised, monkeypatch, strategy):
    words = " ".join(f"w{i}" for i in range(40_000))
    template = make_template(max_length=100, truncation_strategy=strategy)
    found = template.encode(row(0, words))
    assert max(tokenised) < 0.1 * len(words)
    monkeypatch.setattr("swiftlite.llm.template.base.bounded_text", lambda text, spans, *_: (text, spans))
    assert found == template.encode(row(0, words))


def test_values_of_odd_types_cost_their_row_only(make_template):
    rows = [row(i) for i in range(40)]
    rows[3] = row(3, "smile \ud83d")
    rows[4]["messages"][1]["loss"] = "no"
    rows[5]["messages"][1]["loss"] = {}
    rows[6]["messages"] = [1, 2]
    rows[7]["messages"][0]["content"] = ["a"]
    dataset = EncodedDataset(rows, make_template(), max_drop_ratio=0.2)
    assert dataset.row_indices == [i for i in range(40) if i not in (3, 4, 5, 6, 7)]
    assert "half of a surrogate pair" in dataset.report.examples["cannot be encoded"][0]


def test_rows_of_a_file_keep_their_line(make_template, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [row(0), row(1, "\ud83d"), row(2, "long " * 300), row(3)]
    path.write_text("".join(json.dumps(r) + "\n\n" for r in rows))
    rows, _ = load_dataset(str(path))
    for num_proc in (1, 2):
        report = EncodedDataset(rows * 200, make_template(max_length=100), max_drop_ratio=1, num_proc=num_proc).report
        assert report.examples["cannot be encoded"][0].startswith(f"{path}:3 ")
        assert report.examples["longer than --max_length"][0].startswith(f"{path}:5 ")
