"""Files as they are: cells of tables, nulls of Arrow, odd bytes; and which files of a folder are trained on."""

from __future__ import annotations

import json
import logging

import pytest

from swiftlite.llm.dataset import RowError, load_dataset, register_dataset, register_dataset_info
from swiftlite.llm.dataset import files as files_module
from swiftlite.llm.dataset.files import file_reader
from swiftlite.llm.dataset.folder import split_files
from swiftlite.llm.dataset.register import DATASET_MAPPING
from swiftlite.utils.errors import DatasetError, UsageError


def row(i):
    return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def answers(rows):
    return [r["messages"][-1]["content"] for r in rows]


# ---- tables ----

CELLS = ["02116", "1.50", "12345678901234567890123", "None", "NA", "null", "nan", "True", "1e5", "a,b", 'say "hi"',
         "two\nlines", " blank ", "=1+1", "2020-01-01"]  # fmt: skip


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_cells_are_the_characters_of_the_file(tmp_path, name, delimiter):
    quoted = ['"' + cell.replace('"', '""') + '"' if set(cell) & set('",\n') else cell for cell in CELLS]
    lines = [delimiter.join(("query", "response", "system")), *(f"q{delimiter}{cell}{delimiter}" for cell in quoted)]
    (tmp_path / name).write_bytes("\ufeff".encode() + "\r\n".join(lines).replace("two\r\n", "two\n").encode())
    rows, _ = load_dataset(str(tmp_path / name))
    assert answers(rows) == CELLS and all(len(r["messages"]) == 2 for r in rows)
    assert rows[12].place == f"{tmp_path / name}:15"  # a cell of two lines stands before it


def test_rows_of_a_table_that_cannot_be_used(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'query,response\nq,a\nq,a,b\nq,caf\xe9\nq,"a"b\n\n,\nq,c\n')
    found = list(file_reader(path)(0))
    assert [place.rpartition(":")[2] for place, _ in found] == ["2", "3", "4", "5", "8"]
    assert [r.reason if isinstance(r, RowError) else r["response"] for _, r in found] == [
        "a", "more cells than columns", "not UTF-8", "not valid CSV", "c",
    ]  # fmt: skip
    path.write_text('query,response\nq,a\nq,"open\nq,b\n')
    with pytest.raises(DatasetError, match=r"a.csv:3: cannot be read as CSV .* not closed"):
        list(file_reader(path)(0))
    path.write_text("query,query,response\nfirst,second,a\n")
    with pytest.raises(DatasetError, match="a.csv: two columns are named 'query'"):
        list(file_reader(path)(0))


def test_text_is_one_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n 2 \n")
    assert answers(load_dataset(str(tmp_path / "a.txt"))[0]) == ["one", " 2 "]


def test_a_line_that_is_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "_MAX_LINE_BYTES", 200)
    path = write(tmp_path / "a.jsonl", row(0), {"text": "x" * 1000}, row(1))
    found = list(file_reader(path)(0))
    assert [place.rpartition(":")[2] for place, _ in found] == ["1", "2", "3"]
    assert found[1][1].reason == "line too long" and found[2][1] == row(1)


def test_keys_that_arrow_fills_are_not_written(tmp_path):
    datasets = pytest.importorskip("datasets")

    def tool(name, **properties):
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    def called(name, arguments, tools):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "q"}, answer], "tools": tools}

    raw = [
        called("weather", {"city": "Oslo"}, [tool("weather", city={"type": "string", "enum": ["a", None]})]),
        called("add", {"a": 2, "b": 0}, [tool("add", a={"type": "number"}, b={"type": "number"})]),
        called("now", {}, [tool("now")]),
    ]
    table = datasets.Dataset.from_list(raw)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    before = dict(DATASET_MAPPING)
    try:
        register_dataset("made", load=lambda: table)
        for name in (str(tmp_path / "t.parquet"), str(tmp_path / "saved"), "made"):
            rows, _ = load_dataset(name)
            assert rows == raw, name
    finally:
        DATASET_MAPPING.clear()
        DATASET_MAPPING.update(before)


def test_tables_of_a_hub_keep_their_text(tmp_path):
    pytest.importorskip("datasets")
    from swiftlite.llm.dataset.sources import hub_source

    (tmp_path / "train.csv").write_text("query,response\nq,02116\nq,NA\n")
    rows = [r for _, r in hub_source("hf", str(tmp_path), None, "train").read(0)]
    assert [r["response"] for r in rows] == ["02116", "NA"]


# ---- folders ----


def taken(folder, subset=None):
    return [file.relative_to(folder).as_posix() for file in split_files(folder, subset)]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train.jsonl", "test.jsonl", "other.jsonl"], ["train.jsonl"]),
        (["my_train.jsonl", "dev.jsonl"], ["my_train.jsonl"]),
        (["trainer.jsonl", "latest.jsonl"], ["latest.jsonl", "trainer.jsonl"]),
        (["a.jsonl", "b.json"], ["a.jsonl", "b.json"]),
        (["a.jsonl", "LICENSE.txt", "requirements-dev.txt", "README_zh.txt", "notes.txt"], ["a.jsonl"]),
        (["a.jsonl", "config.json", "dataset_info.json", ".hidden/b.jsonl", "__x/c.jsonl"], ["a.jsonl"]),
        (["a.txt", "b.txt", "LICENSE.txt"], ["a.txt", "b.txt"]),
        (["training/a.jsonl", "validation/b.jsonl", "train.jsonl"], ["training/a.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl",
          "train.jsonl"], ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (["train.jsonl", "train.csv"], ["train.jsonl"]),
        (["x.csv", "y.csv", "z.jsonl"], ["x.csv", "y.csv"]),
    ],
)  # fmt: skip
def test_the_training_split_of_a_folder(tmp_path, caplog, names, wanted):
    for name in names:
        write(tmp_path / name, row(0))
    with caplog.at_level(logging.INFO, "swiftlite"):
        assert taken(tmp_path) == sorted(wanted)
    said = caplog.text
    assert all(name in said for name in wanted)
    left = [
        n for n in names if n not in wanted and not n.startswith((".", "_", "LIC", "req", "READ", "con", "dataset"))
    ]
    assert all(name in said.partition("not read")[2] for name in left)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test.jsonl", "a.jsonl"], "holds no split train .it has test: test.jsonl.; name the file"),
        (["LICENSE.txt", "requirements.txt", "config.json"], "holds no data files"),
    ],
)
def test_a_folder_without_training_data(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, row(0))
    with pytest.raises(DatasetError, match=message):
        split_files(tmp_path)


def readme(folder, text):
    (folder / "README.md").write_text(f"---\n{text}\n---\n# Title\n")


def test_the_readme_of_a_folder_decides(tmp_path):
    for name in ("en/a.jsonl", "en/b.jsonl", "de/a.jsonl", "train.jsonl"):
        write(tmp_path / name, row(0))
    readme(tmp_path, "configs:\n- config_name: en\n  data_files:\n  - {split: train, path: en/a*}\n  - {split: test, "
           "path: [en/b.jsonl]}\n- config_name: de\n  data_dir: de")  # fmt: skip
    assert taken(tmp_path, "en") == ["en/a.jsonl"]
    assert taken(tmp_path, "de") == ["de/a.jsonl"]
    with pytest.raises(DatasetError, match="has subsets en, de; choose with"):
        split_files(tmp_path)
    with pytest.raises(DatasetError, match=r"no such subset or folder; README.md names en, de"):
        split_files(tmp_path, "fr")
    for files in ("'**/a.jsonl'", "{train: '**/a.jsonl'}", "['en/a.jsonl', 'de/a.jsonl']"):
        readme(tmp_path, f"configs:\n- config_name: default\n  data_files: {files}")
        assert taken(tmp_path) == ["de/a.jsonl", "en/a.jsonl"]
    for files, message in (("../x.jsonl", "not below its folder"), ("/etc/x.txt", "not below its folder"),
                           ("none.jsonl", "no file fits"), ("3", "data_files must be")):  # fmt: skip
        readme(tmp_path, f"configs:\n- config_name: default\n  data_files: {files}")
        with pytest.raises(DatasetError, match=message):
            split_files(tmp_path)
    readme(tmp_path, "configs: [")
    with pytest.raises(DatasetError, match=r"README.md: its header cannot be read"):
        split_files(tmp_path)


# ---- LLaMA-Factory's dataset_info.json ----


def test_tags_and_ranking(tmp_path, caplog):
    write(tmp_path / "s.jsonl", {"conv": [{"who": "Q", "text": "q"}, {"who": "A", "text": "a"}], "sysm": "S"})
    pair = {"conversations": [{"from": "human", "value": "q"}], "good": {"from": "gpt", "value": "a"},
            "bad": {"from": "gpt", "value": "b"}}  # fmt: skip
    write(tmp_path / "p.jsonl", pair)
    tags = {"role_tag": "who", "content_tag": "text", "user_tag": "Q", "assistant_tag": "A"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({
        "tagged": {"file_name": "s.jsonl", "formatting": "sharegpt", "tags": tags, "num_samples": 3,
                   "columns": {"messages": "conv", "system": "sysm"}},
        "ranked": {"file_name": "p.jsonl", "formatting": "sharegpt", "ranking": True,
                   "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"}},
    }))  # fmt: skip
    before = dict(DATASET_MAPPING)
    try:
        register_dataset_info(str(tmp_path / "dataset_info.json"))
        assert "num_samples" in caplog.text
        question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
        assert load_dataset("tagged")[0] == [{"messages": [{"role": "system", "content": "S"}, question, answer]}]
        assert load_dataset("ranked")[0] == [
            {"messages": [question, answer], "rejected_messages": [question, {**answer, "content": "b"}]}
        ]
        for text in ("[1]", '{"a": 1}', "3", '{"a": {"file_name": 3}}', '{"a": {"path": "x", "columns": [1]}}'):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(UsageError, match="bad.json: "):
                register_dataset_info(str(tmp_path / "bad.json"))
    finally:
        DATASET_MAPPING.clear()
        DATASET_MAPPING.update(before)
