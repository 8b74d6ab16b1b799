"""docs/data.md: its rows are recognised, its registrations work, its flags and names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

from swiftlite.arguments.parser import alias_table
from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.dataset import DATASET_MAPPING, preprocess, register_dataset_info
from swiftlite.llm.dataset.group_rows import group_row
from swiftlite.llm.template.loss_scale import PATTERNS, STRATEGIES

TEXT = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_rows():
    lines = [json.loads(line) for line in blocks("jsonl")[0].splitlines()]
    rows = [preprocess(line) for line in lines[:10]] + [preprocess(line, answered=False) for line in lines[10:]]
    assert [row.get("label") for row in rows[10:]] == [1, [0, 2]]
    assert sum("rejected_messages" in row for row in rows) == 2 and sum("tools" in row for row in rows) == 1
    assert rows[8]["label"] is False
    groups = [group_row(json.loads(line)) for line in blocks("jsonl")[1].splitlines()]
    assert [len(row["negative_messages"]) for row in groups] == [1, 2, 2, 1, 0, 0]
    assert [row.get("label") for row in groups] == [None] * 4 + [0.8, 0.0]


def test_registrations(tmp_path):
    before = dict(DATASET_MAPPING)
    try:
        exec(blocks("python")[0])
        assert {"sums", "notes", "web"} <= set(DATASET_MAPPING)
        (tmp_path / "info.json").write_text(blocks("json")[0])
        assert register_dataset_info(str(tmp_path / "info.json")) == ["notes", "web"]
    finally:
        DATASET_MAPPING.clear()
        DATASET_MAPPING.update(before)


def test_flags_and_names():
    known = {*alias_table(DpoArguments), "to_cached_dataset", "template_mode", "num_rows", "html"}
    assert set(re.findall(r"--(\w+)", TEXT)) <= known
    for name in re.findall(r"`\+(\w+)`", TEXT):
        assert name in PATTERNS
    assert all(f"`{name}`" in TEXT for name in STRATEGIES)
