"""Files become rows: sampling, splitting, drop reports, and errors that name file and line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from swiftlite.llm.dataset import load_dataset
from swiftlite.utils.errors import DatasetError, UsageError


def row(i):
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def answers(rows):
    return [r["messages"][-1]["content"] for r in rows]


@pytest.fixture
def ten(tmp_path):
    return write_jsonl(tmp_path / "ten.jsonl", [row(i) for i in range(10)])


def test_files_and_order(ten, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([row(10), row(11)]))
    single = tmp_path / "single.json"
    single.write_text(json.dumps(row(12), indent=2))
    lines = tmp_path / "lines.json"
    lines.write_text(json.dumps(row(13)) + "\n\n" + json.dumps(row(14)) + "\n")
    train, val = load_dataset([ten, str(other), str(single), str(lines)])
    assert answers(train) == [f"a{i}" for i in range(15)] and val == []


def test_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row(1)).encode() + b"\r\n  \r\n")
    assert answers(load_dataset([str(path)])[0]) == ["a1"]


def test_directory(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [row(1)])
    write_jsonl(tmp_path / "a.jsonl", [row(0)])
    (tmp_path / "README.md").write_text("no data")
    assert answers(load_dataset([str(tmp_path)])[0]) == ["a0", "a1"]


def test_sampling(ten):
    four = answers(load_dataset([f"{ten}#4"])[0])
    assert len(set(four)) == 4 and four == sorted(four)
    assert four == answers(load_dataset([f"{ten}#4"])[0])
    assert four != answers(load_dataset([f"{ten}#4"], seed=1)[0])
    many = answers(load_dataset([f"{ten}#23"])[0])
    assert len(many) == 23 and all(many.count(f"a{i}") in (2, 3) for i in range(10))
    for bad in ("0", "x", "-1", ""):
        with pytest.raises(UsageError, match="#"):
            load_dataset([f"{ten}#{bad}"])


def test_split(ten):
    train, val = load_dataset([ten], split_dataset_ratio=0.25)
    assert len(val) == 2 and sorted(answers(train) + answers(val)) == [f"a{i}" for i in range(10)]
    assert (train, val) == load_dataset([ten], split_dataset_ratio=0.25)
    assert val != load_dataset([ten], split_dataset_ratio=0.25, seed=3)[1]
    assert len(load_dataset([ten], split_dataset_ratio=0.001)[1]) == 1
    train, val = load_dataset([ten], val_datasets=[f"{ten}#3"], split_dataset_ratio=0.5)
    assert (len(train), len(val)) == (10, 3)
    with pytest.raises(DatasetError, match="cannot be split"):
        load_dataset([f"{ten}#1"], split_dataset_ratio=0.5)


def test_tables(tmp_path):
    pytest.importorskip("datasets")
    csv = tmp_path / "t.csv"
    csv.write_text('query,response\nq0,a0\n"q,1",a1\n')
    text = tmp_path / "t.txt"
    text.write_text("one\ntwo\n")
    train, _ = load_dataset([str(csv), str(text)])
    assert answers(train) == ["a0", "a1", "one", "two"]
    bad = tmp_path / "t.parquet"
    bad.write_bytes(b"not parquet")
    with pytest.raises(DatasetError, match="cannot be read as parquet"):
        load_dataset([str(bad)])


def test_bad_rows_are_counted_and_named(tmp_path, caplog):
    rows = [row(i) for i in range(48)] + [{"messages": []}, {"foo": 1}]
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert len(load_dataset([path], max_drop_ratio=0.05)[0]) == 48
    with pytest.raises(DatasetError) as caught:
        load_dataset([path], max_drop_ratio=0.03)
    text = str(caught.value)
    assert "2 of 50 rows dropped" in text and f"{path}:49" in text and "1x messages is empty" in text
    assert "columns foo" in text and "\n" not in text
    with pytest.raises(DatasetError, match="no row is left"):
        load_dataset([write_jsonl(tmp_path / "all.jsonl", [{"foo": 1}])], max_drop_ratio=1.0)


def test_mixed_formats_in_one_file(tmp_path):
    path = write_jsonl(tmp_path / "mixed.jsonl", [row(0), {"query": "q", "response": "a1"}, {"text": "a2"}])
    assert answers(load_dataset([path])[0]) == ["a0", "a1", "a2"]


@pytest.mark.parametrize(
    ("name", "raw", "place"),
    [
        ("x.jsonl", b'{"query": "q", "response": "a"}\n{"query": "q", \n', "x.jsonl:2"),
        ("x.jsonl", b'{"query": "\xff"}\n', "1x not UTF-8"),
        ("x.json", b'[{"query": 1}, ', "x.json"),
        ("x.json", b'{"query": "q", "response": "a"}\n{"query"\n', "x.json:2"),
        ("x.jsonl", b"", "holds no rows"),
        ("x.xml", b"<a/>", "ending '.xml'"),
    ],
)
def test_unreadable_files(tmp_path, name, raw, place):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DatasetError) as caught:
        load_dataset([str(path)])
    assert place in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        load_dataset([str(tmp_path / "none.jsonl#5")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no data files"):
        load_dataset([str(tmp_path / "empty")])


def test_self_cognition_names(tmp_path):
    rows = [{"query": "who?", "response": "{{NAME}} by {{AUTHOR}}", "tag": tag} for tag in ("zh", "en")]
    path = write_jsonl(tmp_path / "self.jsonl", rows)
    train, _ = load_dataset([path], model_name=["小", "Small"], model_author="Me")
    assert answers(train) == ["小 by Me", "Small by Me"]
    assert answers(load_dataset([path])[0]) == ["{{NAME}} by {{AUTHOR}}"] * 2


def test_jsonl_needs_no_data_packages(ten):
    code = (
        "import sys; from swiftlite.llm.dataset import load_dataset;"
        f"rows, _ = load_dataset([{ten!r}]); assert len(rows) == 10;"
        "print([m for m in ('datasets', 'pyarrow', 'pandas', 'torch') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_batch_larger_than_the_data_is_told(caplog):
    from types import SimpleNamespace

    from swiftlite.train.order import steps_of

    args = SimpleNamespace(train_iters=3, num_train_epochs=None)
    assert steps_of([0] * 4, args, 4) == 3 and not caplog.text
    assert steps_of([0] * 3, args, 4) == 3
    assert "3 samples, fewer than the global batch of 4: each step repeats samples" in caplog.text
