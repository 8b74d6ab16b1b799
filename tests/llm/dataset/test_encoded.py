"""EncodedDataset: what encode gives, in order, with a report of what was left out."""

from __future__ import annotations

import os
import signal

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.llm.dataset import EncodedDataset
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
        os.kill(next(iter(encode._pool._processes)), signal.SIGKILL)
        with pytest.raises(DatasetError, match="--dataset_num_proc 2: a process that tokenises was killed"):
            list(again)


def test_nothing_left(make_template):
    with pytest.raises(DatasetError, match="no row is left"):
        EncodedDataset([row(0)], make_template(max_length=3), max_drop_ratio=1.0)
    with pytest.raises(DatasetError, match="no rows"):
        EncodedDataset([], make_template())


def test_truncation_keeps_rows(make_template):
    dataset = EncodedDataset([row(0, "long " * 200)], make_template(max_length=50, truncation_strategy="right"))
    assert dataset.lengths == [50]
