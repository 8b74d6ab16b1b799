"""Batches: padding on both sides, multiples, weights, and rows joined without padding."""

from __future__ import annotations

import pytest
import torch

from swiftlite.llm.template import get_template

ROWS = [
    {"input_ids": [11, 12, 13], "labels": [-100, 12, 13]},
    {"input_ids": [21, 22], "labels": [21, 22], "loss_scale": [1.0, 0.5]},
]


@pytest.fixture
def make_template(make_tokenizer):
    return lambda **kwargs: get_template("chatml", make_tokenizer(eos_token="<|im_end|>"), **kwargs)


def test_right_padding(make_template):
    batch = make_template().data_collator(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13], [21, 22, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13], [-100, 22, -100]], "nothing predicts a first token"
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["loss_scale"].tolist() == [[0.0, 1.0, 1.0], [1.0, 0.5, 0.0]]
    assert batch["input_ids"].dtype == torch.int64


def test_left_padding_and_multiples(make_template):
    batch = make_template(padding_side="left", sequence_parallel_size=2).data_collator(ROWS[:1] * 2)
    assert batch["input_ids"].tolist() == [[0, 11, 12, 13]] * 2
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2]] * 2
    assert "loss_scale" not in batch
    assert make_template().data_collator(ROWS, pad_to_multiple_of=8)["labels"].shape == (2, 8)
    assert make_template().data_collator(ROWS, pad_to=5)["labels"].shape == (2, 5)


def test_padding_free(make_template):
    batch = make_template(padding_free=True).data_collator(ROWS)
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100, 22]], (
        "a row's first token must not be predicted from another row"
    )
    assert batch["loss_scale"].tolist() == [[0.0, 1.0, 1.0, 0.0, 0.5]]
    assert "attention_mask" not in batch
