"""Where rows come from: words of --dataset, hubs (a local fake), registered datasets, mixtures, rejected rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from swiftlite.llm.dataset import load_dataset, register_dataset, register_dataset_info
from swiftlite.llm.dataset.loader import Mixture, ReadOptions, RowStream
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.register import DATASET_MAPPING
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.sources import Spec, parse_spec
from swiftlite.utils.errors import DatasetError, UsageError


def row(i):
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def answers(rows):
    return [r["messages"][-1]["content"] for r in rows]


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr("swiftlite.llm.dataset.register.DATASET_MAPPING", DATASET_MAPPING)
    before = dict(DATASET_MAPPING)
    yield
    DATASET_MAPPING.clear()
    DATASET_MAPPING.update(before)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a/b", Spec("a/b", "a/b")),
        ("hf::a/b:x/y#10", Spec("hf::a/b:x/y#10", "a/b", "hf", ("x", "y"), 10)),
        ("MS::a/b#3", Spec("MS::a/b#3", "a/b", "ms", (), 3)),
        ("name", Spec("name", "name")),
        ("a/b:x", Spec("a/b:x", "a/b", None, ("x",))),
    ],
)
def test_words(text, spec):
    assert parse_spec(text) == spec


def test_words_of_local_files(tmp_path):
    path = write(tmp_path / "a#b:c.jsonl", [row(0)])
    assert parse_spec(path) == Spec(path, path)
    assert parse_spec(f"{path}#7").count == 7
    with pytest.raises(DatasetError, match="no such file or directory; .*hub id like owner/name"):
        load_dataset("nowhere")
    with pytest.raises(DatasetError, match="no such file or directory"):
        load_dataset(str(tmp_path / "a" / "b" / "c.jsonl"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Both hubs' clients, fed from a local folder per id; they record what they were asked for."""
    datasets = pytest.importorskip("datasets")
    modelscope = pytest.importorskip("modelscope")
    root, asked = tmp_path / "hub", []
    configs = []
    for subset, start in (("default", 0), ("x", 10), ("y", 20)):
        folder = root / "owner" / "data" / subset
        folder.mkdir(parents=True)
        write(folder / "train.jsonl", [row(start + i) for i in range(4)])
        write(folder / "test.jsonl", [row(start + 5)])
        files = [f"  - {{split: {split}, path: {subset}/{split}.jsonl}}" for split in ("train", "test")]
        configs.append(f"- config_name: {subset}\n  data_files:\n" + "\n".join(files))
    (root / "owner" / "data" / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    real = datasets.load_dataset

    def folder_of(name):
        if not (root / name).is_dir():
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        return str(root / name)

    def load(name, subset=None, *, streaming=False, **kwargs):
        asked.append((name.replace(str(root), "ROOT"), subset, streaming))
        return real(name if Path(name).is_absolute() else folder_of(name), subset, streaming=streaming, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(modelscope, "dataset_snapshot_download", folder_of)
    return asked


def test_hubs(hub):
    assert answers(load_dataset("owner/data")[0]) == ["a0", "a1", "a2", "a3"]
    assert answers(load_dataset("owner/data:x/y", use_hf=True)[0]) == [
        f"a{i}" for i in (10, 11, 12, 13, 20, 21, 22, 23)
    ]
    assert len(load_dataset("hf::owner/data#3")[0]) == 3
    assert hub == [
        ("ROOT/owner/data", None, False),
        ("owner/data", "x", False),
        ("owner/data", "y", False),
        ("owner/data", None, False),
    ]
    with pytest.raises(DatasetError, match=r"ms::owner/none: cannot be fetched .*doesn't exist.*try hf::owner/none"):
        load_dataset("owner/none")


def test_hubs_streamed(hub):
    stream = RowStream(["hf::owner/data:x", "ms::owner/data#6"], ReadOptions(streaming=True))
    rows = [r for _, r in stream]
    assert answers(rows) == [*(f"a{i}" for i in (10, 11, 12, 13)), "a0", "a1", "a2", "a3", "a0", "a1"]
    assert {asked[2] for asked in hub} == {True}


def test_local_directories(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "repo" / "data").mkdir(parents=True)
    datasets.Dataset.from_list([row(0), row(1)]).to_parquet(tmp_path / "repo" / "data" / "train-00000.parquet")
    assert answers(load_dataset(str(tmp_path / "repo"))[0]) == ["a0", "a1"]
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row(2)])}).save_to_disk(tmp_path / "saved")
    assert answers(load_dataset(str(tmp_path / "saved"))[0]) == ["a2"]


def test_registered_in_python(tmp_path):
    register_dataset("sums", load=lambda: ({"ask": f"{i}+1", "say": str(i + 1)} for i in range(3)),
                     columns={"ask": "query", "say": "response"})  # fmt: skip
    register_dataset("odd", path=write(tmp_path / "odd.jsonl", [{"n": i} for i in range(20)]),
                     preprocess=lambda r: None if r["n"] == 7 else {"query": str(r["n"]), "response": str(10 // r["n"])}
                     if r["n"] else {"query": "0", "response": "none"})  # fmt: skip
    assert answers(load_dataset("sums")[0]) == ["1", "2", "3"]
    assert len(load_dataset("odd", max_drop_ratio=0.1)[0]) == 19
    with pytest.raises(UsageError, match="registered already"):
        register_dataset("sums", path="x")
    with pytest.raises(UsageError, match="give one of path, load"):
        register_dataset("none")
    with pytest.raises(UsageError, match="unexpected keyword argument 'pth'; fields: name, path"):
        register_dataset("typo", pth="x")
    register_dataset("broken", load=lambda: [{"x": 1}], preprocess=lambda r: r["y"])
    with pytest.raises(DatasetError, match="own preprocess failed: KeyError"):
        load_dataset("broken")


def test_custom_file_registers(tmp_path):
    from swiftlite.checkpoint.resolve import register_custom

    file = tmp_path / "mine.py"
    file.write_text(
        "from swiftlite.llm.dataset import register_dataset\n"
        "register_dataset('mine', load=lambda: [{'query': 'q', 'response': 'from python'}])\n"
    )
    register_custom([str(file)])
    assert answers(load_dataset("mine")[0]) == ["from python"]


def test_dataset_info(tmp_path, hub):
    write(tmp_path / "own.jsonl", [{"question": "q", "reply": "own"}])
    write(tmp_path / "alpaca.jsonl", [{"task": "do", "context": "this", "done": "alpaca"}])
    (tmp_path / "swift.json").write_text(json.dumps([
        {"dataset_name": "own", "dataset_path": "own.jsonl", "columns": {"question": "query", "reply": "response"}},
        {"ms_dataset_id": "owner/data", "subsets": ["y"]},
    ]))  # fmt: skip
    (tmp_path / "factory.json").write_text(json.dumps({
        "alpaca": {"file_name": "alpaca.jsonl", "columns": {"prompt": "task", "query": "context", "response": "done"}},
        "remote": {"hf_hub_url": "owner/data", "subset": "x"},
    }))  # fmt: skip
    assert register_dataset_info(str(tmp_path / "swift.json")) == ["own", "owner/data"]
    assert register_dataset_info(str(tmp_path / "factory.json")) == ["alpaca", "remote"]
    assert answers(load_dataset("own")[0]) == ["own"]
    assert answers(load_dataset("owner/data")[0]) == ["a20", "a21", "a22", "a23"]
    assert load_dataset("alpaca")[0] == [
        {"messages": [{"role": "user", "content": "do\nthis"}, {"role": "assistant", "content": "alpaca"}]}
    ]
    assert answers(load_dataset("remote")[0]) == ["a10", "a11", "a12", "a13"]
    (tmp_path / "bad.json").write_text('{"x": {"columns": {}}}')
    with pytest.raises(UsageError, match="bad.json: dataset 'None'|bad.json: dataset 'x'"):
        register_dataset_info(str(tmp_path / "bad.json"))
    with pytest.raises(UsageError, match="cannot be read"):
        register_dataset_info(str(tmp_path / "none.json"))


# ---- mixing ----


@pytest.fixture
def three(tmp_path):
    return [
        write(tmp_path / f"{name}.jsonl", [{"query": "q", "response": f"{name}{i}"} for i in range(count)])
        for name, count in (("a", 40), ("b", 100), ("c", 20))
    ]


def test_interleaving_follows_the_probabilities():
    mixture = list(Mixture([10_000, 10_000, 10_000], [0.5, 0.3, 0.2], "first_exhausted", "7-mix"))
    counts = Counter(part for part, _ in mixture[:10_000])
    assert [round(counts[i] / 10_000, 1) for i in range(3)] == [0.5, 0.3, 0.2]
    for part in range(3):
        indices = [index for p, index in mixture if p == part]
        assert indices == list(range(len(indices))), "each in its own order"
    assert mixture[:50] == list(Mixture([99, 99, 99], [0.5, 0.3, 0.2], "first_exhausted", "7-mix"))[:50]


@pytest.mark.parametrize("strategy", ["first_exhausted", "all_exhausted"])
def test_a_stream_mixes_as_the_whole_does(three, strategy):
    settings = {"interleave_prob": [0.5, 0.3, 0.2], "stopping_strategy": strategy}
    whole, _ = load_dataset(three, seed=5, **settings)
    streamed = [r for _, r in RowStream(three, ReadOptions(streaming=True), seed="5", **settings)]
    assert streamed == whole
    counts = Counter(text[0] for text in answers(whole))
    if strategy == "first_exhausted":
        assert any(counts[name] == count for name, count in (("a", 40), ("b", 100), ("c", 20)))
        assert counts["b"] < 100
    else:
        assert counts["a"] >= 40 and counts["b"] >= 100 and counts["c"] > 20
        assert {f"b{i}" for i in range(100)} <= set(answers(whole))


@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.5, 0.3, 0.3], [1.0, 0.0, 0.0]])
def test_wrong_probabilities(three, probabilities):
    with pytest.raises(UsageError, match="--interleave_prob"):
        load_dataset(three, interleave_prob=probabilities)


@pytest.mark.parametrize("settings", [{}, {"interleave_prob": [0.5, 0.3, 0.2], "stopping_strategy": "all_exhausted"}])
def test_a_stream_goes_on_anywhere(three, settings):
    def open_(state=None):
        return RowStream([three[0], f"{three[1]}#130", three[2]], ReadOptions(streaming=True), state=state, **settings)

    whole = [r for _, r in open_()]
    assert len(whole) >= 190
    for stop in (0, 1, 39, 40, 41, 150, 170, len(whole) - 1):
        stream = open_()
        iterator = iter(stream)
        first = [next(iterator)[1] for _ in range(stop)]
        state = json.loads(json.dumps(stream.state()))
        assert first + [r for _, r in open_(state)] == whole, stop


# ---- rows that cannot be used ----


def test_bad_rows_of_every_kind_are_counted_and_written_down(tmp_path):
    good = [json.dumps(row(i)).encode() for i in range(100)]
    huge = json.dumps({"query": "q", "response": ["x" * 3_000_000]}).encode()
    bad = [
        (b'{"messages": [{"role": "user", "content": "no end"', "not valid JSON"),
        (b'{"query": "\xff\xfe", "response": "a"}', "not UTF-8"),
        (b"[1, 2]", "not an object"),
        (b"{}", "no known format"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": "hi"}', "messages is text but not JSON"),
        (b'{"messages": {"role": "user"}}', "messages is not a list"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "unknown role"),
        (b'{"messages": [{"content": "x"}]}', "a message has no role"),
        (b"[" * 100_000, "nested too deeply"),
        (huge, "column is not text"),
    ]
    lines = good + [line for line, _ in bad]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    rejects = RejectsFile(tmp_path / "out" / "rejects.jsonl")
    rows, _ = load_dataset(str(path), max_drop_ratio=0.2, rejects=rejects)
    assert len(rows) == 100
    written = [json.loads(line) for line in rejects.path.read_text(encoding="utf-8").splitlines()]
    assert [entry["reason"] for entry in written] == [reason for _, reason in bad]
    assert [entry["place"] for entry in written] == [f"{path}:{101 + i}" for i in range(len(bad))]
    assert written[3]["row"] == {} and written[0]["row"].endswith('no end"')
    assert max(len(json.dumps(entry)) for entry in written) < 50_000
    with pytest.raises(DatasetError, match=r"11 of 111 rows dropped.*--max_drop_ratio 0.05.*rejects.jsonl"):
        load_dataset(str(path), rejects=RejectsFile(rejects.path))


def test_no_rejects_file_without_rejects(tmp_path):
    rejects = RejectsFile(tmp_path / "rejects.jsonl")
    rejects.path.write_text("of an earlier run")
    rejects = RejectsFile(tmp_path / "rejects.jsonl")
    load_dataset(write(tmp_path / "a.jsonl", [row(0)]), rejects=rejects)
    assert not Path(rejects.path).exists()


def test_bad_lines_in_a_stream(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(0)) + "\n{\n" + json.dumps(row(1)) + "\n")
    found = [r for _, r in RowStream([str(path)], ReadOptions(streaming=True))]
    assert isinstance(found[1], RowError) and found[1].reason == "not valid JSON"
    with pytest.raises(DatasetError, match="holds no rows"):
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        list(RowStream([str(empty)], ReadOptions(streaming=True)))
