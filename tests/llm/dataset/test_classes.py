"""The column `label`: what is taken, what drops a row, and the tensor that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swiftlite.arguments.task import PROBLEMS
from swiftlite.llm.dataset.classes import Labels, problem_of
from swiftlite.llm.dataset.loader import load_dataset
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.utils.errors import DatasetError

SINGLE, MULTI, NUMBERS = PROBLEMS
GOOD = [
    (SINGLE, 3, 2, 2), (SINGLE, 3, "1", 1), (SINGLE, 2, True, 1), (SINGLE, 3, 2.0, 2),
    (MULTI, 4, [3, 0, 3], [0, 3]), (MULTI, 4, [], []), (MULTI, 4, "[1, 2]", [1, 2]), (MULTI, 4, 2, [2]),
    (NUMBERS, 1, 0.5, 0.5), (NUMBERS, 1, "-2", -2.0), (NUMBERS, 2, [1, 0.25], [1.0, 0.25]),
]  # fmt: skip
BAD = [
    (SINGLE, 3, 3, "label out of range"), (SINGLE, 3, -1, "label out of range"), (SINGLE, 3, "a", "label of a wrong kind"),
    (SINGLE, 3, 0.5, "label of a wrong kind"), (SINGLE, 3, [1], "label of a wrong kind"), (SINGLE, 3, None, "no label"),
    (MULTI, 2, [0, 2], "label out of range"), (MULTI, 2, [0, [1]], "label of a wrong kind"),
    (NUMBERS, 1, "good", "label of a wrong kind"), (NUMBERS, 1, "Infinity", "label of a wrong kind"),
    (NUMBERS, 2, [1.0], "label of a wrong kind"), (NUMBERS, 2, {"a": 1}, "label of a wrong kind"),
]  # fmt: skip


@pytest.mark.parametrize("problem, count, given, wanted", GOOD)
def test_labels_are_read(problem: str, count: int, given: object, wanted: object) -> None:
    found = Labels(problem, count).read({"label": given})
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("problem, count, given, why", BAD)
def test_bad_labels_are_told(problem: str, count: int, given: object, why: str) -> None:
    with pytest.raises(RowError) as told:
        Labels(problem, count).read({} if given is None else {"label": given})
    assert told.value.reason == why and told.value.seen


def test_tensors_are_what_transformers_takes() -> None:
    assert torch.equal(Labels(SINGLE, 3).tensor([2, 0]), torch.tensor([2, 0]))
    assert torch.equal(Labels(MULTI, 3).tensor([[0, 2], []]), torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(Labels(NUMBERS, 1).tensor([0.5, -1.0]), torch.tensor([[0.5], [-1.0]]))
    assert torch.equal(Labels(NUMBERS, 2).tensor([[0.5, -1.0]]), torch.tensor([[0.5, -1.0]]))


@pytest.mark.parametrize(
    "count, labels, wanted",
    [(1, [3], NUMBERS), (3, [None, 2], SINGLE), (3, [[0, 1]], MULTI), (2, [[0.5, 1]], NUMBERS), (3, [], SINGLE)],
)
def test_kind_of_labels_by_the_first_row(count: int, labels: list[object], wanted: str) -> None:
    rows = [("", {} if label is None else {"label": label}) for label in labels]
    assert problem_of(count, [("", RowError("bad")), *rows]) == wanted


def test_rows_with_bad_labels_are_dropped_and_told(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([0, 1, 7, "x"])] + [{"text": "none"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rejects = RejectsFile(tmp_path / "rejects.jsonl")
    options = {"answered": False, "labels": Labels(SINGLE, 2), "rejects": rejects}
    found, _ = load_dataset(str(file), max_drop_ratio=0.9, **options)  # type: ignore[arg-type]
    assert [(row["messages"], row["label"]) for row in found] == [
        ([{"role": "user", "content": f"t{i}"}], i) for i in range(2)
    ]
    told = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(line["reason"], line["row"]) for line in told] == [
        ("label out of range", rows[2]), ("label of a wrong kind", rows[3]), ("no label", rows[4]),
    ]  # fmt: skip
    with pytest.raises(DatasetError, match="1x label out of range .*7; --num_labels 2 has 0 to 1"):
        load_dataset(str(file), **options)  # type: ignore[arg-type]
