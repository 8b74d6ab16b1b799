"""Packing: every sample once, nothing too long, little room left, positions of their own."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.llm.dataset import EncodedDataset, PackedDataset
from swiftlite.llm.dataset.packing import pack, pack_in_order, pack_windows
from swiftlite.llm.template import get_template
from swiftlite.train.order import SampleOrder
from swiftlite.utils.errors import UsageError


def test_best_fit_longest_first():
    # 6+4, 5+5, 3+3+2+2: the best fit, not the first.
    assert pack([5, 3, 6, 2, 4, 5, 3, 2], 10) == [[0, 5], [1, 3, 6, 7], [2, 4]]
    assert pack([10, 1], 10) == [[0], [1]]
    assert pack([], 10) == []
    with pytest.raises(UsageError, match="11 tokens does not fit into sequences of 10"):
        pack([11], 10)


@pytest.mark.parametrize("seed", range(5))
def test_every_sample_is_packed_once(seed):
    rng = random.Random(seed)
    lengths = [min(2048, max(3, int(rng.lognormvariate(5.5, 0.9)))) for _ in range(3000)]
    sequences = pack_windows(lengths, 2048, seed, window=1000)
    assert sorted(i for sequence in sequences for i in sequence) == list(range(3000))
    sums = [sum(lengths[i] for i in sequence) for sequence in sequences]
    assert max(sums) <= 2048
    assert sum(sums) / (len(sums) * 2048) > 0.97
    assert sequences == pack_windows(lengths, 2048, seed, window=1000)
    assert sequences != pack_windows(lengths, 2048, seed + 1, window=1000)


def test_a_heavy_tail_leaves_less_than_one_percent_of_padding():
    draw = random.Random(0)
    for capacity in (2048, 8192, 32768):
        lengths = [min(capacity, max(3, int(draw.lognormvariate(6.5, 1.3)))) for _ in range(20_000)]
        assert sum(lengths) / (len(pack_windows(lengths, capacity, 0)) * capacity) > 0.99
        assert sum(lengths) / (len(pack_in_order(lengths, capacity)) * capacity) < 0.97


def test_samples_in_their_order():
    assert pack_in_order([5, 3, 6, 2, 4, 5], 10) == [[0, 1], [2, 3], [4, 5]]
    assert pack_in_order([10, 1], 10) == [[0], [1]]


def test_a_packed_sequence(tiny_tokenizer_dir):
    template = get_template("chatml", PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir))
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a " * (i + 1)}]}
        for i in range(6)
    ]
    rows[2]["messages"][1]["loss_scale"] = 0.5
    dataset = EncodedDataset(rows, template)
    packed = PackedDataset(dataset, 120, sequences=[[1, 2], [0, 3, 5, 4]])
    item = packed[0]
    one, two = dataset[1], dataset[2]
    assert item["input_ids"] == one["input_ids"] + two["input_ids"]
    assert item["labels"] == [-100, *one["labels"][1:], -100, *two["labels"][1:]]
    assert item["position_ids"] == [*range(len(one["input_ids"])), *range(len(two["input_ids"]))]
    assert item["sample_lengths"] == [one["length"], two["length"]]
    assert item["length"] == packed.lengths[0] == sum(item["sample_lengths"])
    assert item["loss_scale"][len(one["input_ids"]) + 1 :] == two["loss_scale"][1:]
    assert packed.fill_rate == pytest.approx(sum(dataset.lengths) / 240)
    # Two packed sequences in a micro batch: joined once more, borders kept.
    template.padding_free = True
    batch = template.data_collator([packed[0], packed[1]])
    assert batch["input_ids"].shape == (1, sum(packed.lengths))
    assert (batch["position_ids"] == 0).sum() == 6


def test_grouping_by_length():
    rng = random.Random(0)
    lengths = [rng.randint(1, 1000) for _ in range(1003)]
    order = SampleOrder(1003, seed=1, lengths=lengths, batch_size=8)
    indices = order.slice(0, 1003)
    assert sorted(indices) == list(range(1003))
    batches = [[lengths[i] for i in indices[start : start + 8]] for start in range(0, 1000, 8)]
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in batches) / sum(map(sum, batches))
    plain = SampleOrder(1003, seed=1).slice(0, 1000)
    plain_batches = [[lengths[i] for i in plain[start : start + 8]] for start in range(0, 1000, 8)]
    plain_padding = sum(max(b) * len(b) - sum(b) for b in plain_batches) / sum(map(sum, plain_batches))
    assert padding < 0.05 < 0.5 < plain_padding
    firsts = [batch[0] for batch in batches]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True), "no curriculum"
    assert indices != order.slice(1003, 2006), "another order in the next epoch"
    assert indices == SampleOrder(1003, seed=1, lengths=lengths, batch_size=8).slice(0, 1003)
