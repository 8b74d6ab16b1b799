"""Streams: all rows once per epoch, packed in windows, and the same samples after a restart anywhere."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.llm.dataset import StreamedDataset, store
from swiftlite.llm.dataset.loader import ReadOptions, RowStream
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.template import get_template
from swiftlite.train.order import StreamOrder, read_data_state, write_data_state
from swiftlite.utils.errors import DatasetError, UsageError


def write(path, count, text="a", bad=()):
    lines = [
        "{" if i in bad else json.dumps({"query": f"{path.stem}{i}", "response": text * (1 + i * 7 % 23)})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def make(tmp_path, tiny_tokenizer_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    files = [write(tmp_path / "x.jsonl", 50), write(tmp_path / "y.jsonl", 33)]

    def stream(names=files, mix=None, **kwargs):
        def open_rows(state):
            return RowStream(
                names, ReadOptions(streaming=True), interleave_prob=mix, stopping_strategy="all_exhausted", state=state
            )

        return StreamedDataset(open_rows, get_template("chatml", tokenizer, max_length=128), **{"window": 16, **kwargs})

    return stream


def questions(dataset, start, stop):
    decode = dataset._encode.template.tokenizer.decode
    return [decode(dataset[i]["input_ids"]).split("user\n")[1].split("<|im_end|>")[0] for i in range(start, stop)]


def test_an_epoch_holds_every_row_once(make):
    dataset = make()
    first, second = questions(dataset, 0, 83), questions(dataset, 83, 166)
    everything = {f"x{i}" for i in range(50)} | {f"y{i}" for i in range(33)}
    assert set(first) == set(second) == everything
    assert first != second, "shuffled anew"
    assert first != sorted(first)
    assert set(first[:16]) == {f"x{i}" for i in range(16)}, "within a window"
    assert questions(make(shuffle=False), 0, 83) == [f"x{i}" for i in range(50)] + [f"y{i}" for i in range(33)]
    assert questions(make(seed=2), 0, 16) != first[:16]


@pytest.mark.parametrize("capacity", [None, 128])
@pytest.mark.parametrize("mix", [None, [0.7, 0.3]])
def test_a_stream_goes_on_after_a_restart(make, capacity, mix, tmp_path):
    """Positions in the first window, at its borders, in later epochs; with and without the recorded state."""
    count = 130 if capacity is None else 40
    whole = make(capacity=capacity, mix=mix)
    samples, states = [], []
    for i in range(count):
        states.append(json.loads(json.dumps(whole.state(i))))
        samples.append(whole[i])
    for stop in (0, 1, 15, 16, 17, count // 2, count - 2):
        resumed = make(capacity=capacity, mix=mix)
        resumed.load_state(states[stop])
        assert [resumed[i] for i in range(stop, count)] == samples[stop:], stop
        again = make(capacity=capacity, mix=mix)
        assert [again[i] for i in range(stop, min(stop + 3, count))] == samples[stop : stop + 3]
    # A step back, as a loader that had read ahead asks for.
    assert whole[count - 20] == samples[count - 20]
    assert whole[0] == samples[0]
    # The state as it stands in a checkpoint, taken while the loader is ahead.
    ahead = make(capacity=capacity, mix=mix)
    for i in range(count):
        ahead[i]
    write_data_state(ahead, tmp_path, count - 25)
    resumed = make(capacity=capacity, mix=mix)
    read_data_state(resumed, tmp_path)
    if capacity is None:
        assert resumed._start["first"] > 0, "not from the beginning"
    assert [resumed[i] for i in range(count - 25, count)] == samples[-25:]


def test_changed_files_are_told(make, tmp_path, monkeypatch):
    """Another size, and the same size; above the limit of what is looked at, blocks of each file and its end."""
    files = [tmp_path / "x.jsonl", tmp_path / "y.jsonl"]
    for limit in (store._HASHED_BYTES, 16):
        monkeypatch.setattr(store, "_HASHED_BYTES", limit)
        monkeypatch.setattr(store, "_BLOCK_BYTES", min(limit, 64))
        whole = make(facts=store.facts_of_files(files))
        write_data_state(whole, tmp_path, 20)
        again = make(facts=store.facts_of_files(files))
        read_data_state(again, tmp_path)
        assert again[20] == whole[20] and again.facts["bytes"] == sum(file.stat().st_size for file in files)
        for file in files:
            before = file.read_text()
            for text in (before + before, before[:-3] + 'b"}', before.replace("0", "1", 1), ""):
                file.write_text(text)
                with pytest.raises(UsageError, match=r"training data has changed since .* was saved \([0-9]+ bytes"):
                    read_data_state(make(facts=store.facts_of_files(files)), tmp_path)
            file.write_text(before)
    read_data_state(make(), tmp_path)  # a stream that nothing is known of


def test_files_of_a_stream(tmp_path):
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, 3)
    stream = RowStream(
        [str(tmp_path / "data"), str(tmp_path / "data/test-0.jsonl") + "#2"], ReadOptions(streaming=True)
    )
    assert [file.name for file in stream.files] == ["train-0.jsonl", "train-1.jsonl", "test-0.jsonl"]


def test_packed_stream(make):
    dataset = make(capacity=128, window=40)
    seen = []
    for i in range(30):
        item = dataset[i]
        assert item["length"] <= 128 and sum(item["sample_lengths"]) == item["length"]
        assert item["position_ids"] == [p for n in item["sample_lengths"] for p in range(n)]
        text = dataset._encode.template.tokenizer.decode(item["input_ids"])
        seen += [part.split("<|im_end|>")[0] for part in text.split("user\n")[1:]]
    assert len(set(seen[:83])) == 83
    assert 0.8 < dataset.fill_rate <= 1
    # A larger window packs tighter than one that holds a single sequence.
    small = make(capacity=128, window=4)
    [small[i] for i in range(30)]
    assert small.fill_rate < dataset.fill_rate


def test_the_number_of_processes_changes_nothing(make):
    one, two = make(window=40), make(window=40, num_proc=2)
    assert [two[i] for i in range(90)] == [one[i] for i in range(90)]


def test_ranks_divide_a_stream(make):
    """Two ranks read the same stream and take their part of each batch: together they see what one rank sees."""
    alone = make()
    ranks = [make(), make()]
    order = StreamOrder()
    for step in range(10):
        batch = order.slice(step * 8, step * 8 + 8)
        assert [alone[i] for i in batch] == [ranks[0][i] for i in batch[:4]] + [ranks[1][i] for i in batch[4:]]


def test_bad_rows_of_a_stream(make, tmp_path):
    name = write(tmp_path / "bad.jsonl", 60, bad=(3, 30))
    rejects = RejectsFile(tmp_path / "rejects.jsonl")
    dataset = make([name], rejects=rejects, max_drop_ratio=0.1)
    assert len(set(questions(dataset, 0, 58))) == 58
    written = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert [(entry["place"], entry["reason"]) for entry in written[:2]] == [
        (f"{name}:4", "not valid JSON"), (f"{name}:31", "not valid JSON"),
    ]  # fmt: skip
    dataset = make([write(tmp_path / "worse.jsonl", 60, bad=range(0, 60, 2))])
    with pytest.raises(DatasetError, match="training data: 8 of 16 rows dropped.*--max_drop_ratio 0.05"):
        dataset[0]
    dataset = make([write(tmp_path / "none.jsonl", 3, bad=range(3))], max_drop_ratio=1.0)
    with pytest.raises(DatasetError, match="no row is left"):
        dataset[0]


def test_long_rows_of_a_stream(make, tmp_path):
    name = write(tmp_path / "long.jsonl", 20, text="long words " * 6)
    dataset = make([name], max_drop_ratio=1.0)
    lengths = [dataset[i]["length"] for i in range(5)]
    assert max(lengths) <= 128
    assert dataset.report.reasons["longer than --max_length"] > 0
