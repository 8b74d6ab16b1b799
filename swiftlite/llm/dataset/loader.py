"""Data sets from local files: rows in the standard form, sampled, split, with a report of what was dropped.

JSONL and JSON need no package; CSV, Parquet and text are read through `datasets`, imported only then.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.preprocess import Row, RowError, preprocess
from swiftlite.llm.dataset.report import DropReport
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger

# File ending -> builder name of `datasets`; None: read here.
_READERS: dict[str, str | None] = {".jsonl": None, ".json": None, ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

Item = tuple[str, Any]  # where a row stands ("file:line"), the row


def load_dataset(
    datasets: Sequence[str] | str,
    *,
    val_datasets: Sequence[str] | str = (),
    split_dataset_ratio: float = 0.0,
    seed: int = 42,
    columns: Mapping[str, str] | None = None,
    num_proc: int = 1,
    max_drop_ratio: float = 0.05,
    model_name: Sequence[str] | str | None = None,
    model_author: Sequence[str] | str | None = None,
) -> tuple[list[Row], list[Row]]:
    """Read data sets into rows {"messages": [...], "tools"?: [...], "rejected_messages"?: [...], "label"?: ...}.

    Args:
        datasets: files or directories, each `PATH` or `PATH#N`: N rows chosen by seed (above the file's number of rows,
            whole rounds of it and a choice for the rest).
        val_datasets: the same, for evaluation. split_dataset_ratio: share of the training rows taken for evaluation
            where val_datasets is empty, by seed, at least one row.
        columns: old column name -> new one. num_proc: processes that parse CSV, Parquet and text.
        max_drop_ratio: DatasetError if more of a data set's rows cannot be used; fewer are counted in a warning.
        model_name, model_author: text for {{NAME}} and {{AUTHOR}} in the rows (self-cognition data); of two values the
            first is for rows with "tag": "zh".
    Returns: (train rows, validation rows), in the files' order: shuffling is the trainer's.
    Raises: DatasetError naming file and line for what cannot be read, and the reasons where too many rows are dropped.
    """
    fill = {"NAME": _as_list(model_name), "AUTHOR": _as_list(model_author)}

    def load(specs: Sequence[str] | str) -> list[Row]:
        rows: list[Row] = []
        for number, spec in enumerate(_as_list(specs)):
            rows += _load_one(spec, f"{seed}-{number}", columns, num_proc, max_drop_ratio, fill)
        return rows

    train, val = load(datasets), load(val_datasets)
    if not val and split_dataset_ratio > 0:
        if len(train) < 2:
            raise DatasetError(f"{len(train)} rows cannot be split; give --val_dataset or --split_dataset_ratio 0")
        count = min(max(1, round(len(train) * split_dataset_ratio)), len(train) - 1)
        chosen = set(random.Random(f"{seed}-split").sample(range(len(train)), count))
        val = [row for i, row in enumerate(train) if i in chosen]
        train = [row for i, row in enumerate(train) if i not in chosen]
    elif val and split_dataset_ratio > 0:
        get_logger().info("--split_dataset_ratio has no effect beside --val_dataset")
    return train, val


def _load_one(
    spec: str,
    seed: str,
    columns: Mapping[str, str] | None,
    num_proc: int,
    max_drop_ratio: float,
    fill: Mapping[str, Sequence[str]],
) -> list[Row]:
    path, count = _parse_spec(spec)
    report = DropReport()
    rows: list[Row] = []
    for place, item in _read(path, num_proc):
        report.total += 1
        try:
            row = preprocess(item, columns)
        except RowError as error:
            report.drop(error.reason, f"{place} {error.seen}".rstrip())
            continue
        rows.append(_fill(row, item, fill))
    if not report.total:
        raise DatasetError(f"{path}: holds no rows; give a file with at least one")
    report.check(max_drop_ratio, str(path))
    if count is not None:
        order = random.Random(seed)
        whole, rest = divmod(count, len(rows))
        rows = rows * whole + [rows[i] for i in sorted(order.sample(range(len(rows)), rest))]
    get_logger().info("%s: %d rows", path, len(rows))
    return rows


def _parse_spec(spec: str) -> tuple[Path, int | None]:
    """`PATH` or `PATH#N`."""
    path, count = Path(spec).expanduser(), None
    if not path.exists() and "#" in spec:
        name, _, number = spec.rpartition("#")
        path = Path(name).expanduser()
        if not number.isdigit() or int(number) < 1:
            raise UsageError(f"--dataset {spec}: {number!r} after # is no number of rows; write PATH#500")
        count = int(number)
    if not path.exists():
        raise DatasetError(
            f"--dataset {spec}: no such file or directory; give a local .jsonl, .json, .csv or .parquet file"
        )
    return path, count


def _read(path: Path, num_proc: int) -> Iterator[Item]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not files:
            raise DatasetError(f"{path}: holds no data files; known endings: {', '.join(_READERS)}")
        for file in files:
            yield from _read(file, num_proc)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix in _READERS:
        yield from _read_table(path, str(_READERS[path.suffix]), num_proc)
    else:
        raise DatasetError(f"{path}: ending {path.suffix!r} is unknown; known: {', '.join(_READERS)}")


def _read_jsonl(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if line.strip():
                yield place, _parse(_decode(line, place), place)


def _read_json(path: Path) -> Iterator[Item]:
    """A list of rows, one row, or in fact JSONL."""
    text = _decode(path.read_bytes(), str(path))
    try:
        value = json.loads(text)
    except ValueError:
        # Several values, one a line? Where the first line stands alone, its own reader names the faulty line.
        first = text.lstrip().partition("\n")[0]
        if not first.startswith("{") or not _is_json(first):
            _parse(text, str(path))
        yield from _read_jsonl(path)
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _read_table(path: Path, builder: str, num_proc: int) -> Iterator[Item]:
    import datasets

    try:
        table = datasets.load_dataset(
            builder, data_files=str(path), split="train", num_proc=num_proc if num_proc > 1 else None
        )
    except Exception as error:  # datasets raises many kinds; all mean that the file is not what its ending says
        raise DatasetError(f"{path}: cannot be read as {builder} ({_one_line(error)}); check the file") from error
    for number, row in enumerate(table, start=1):
        yield f"{path} row {number}", row


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DatasetError(f"{place}: is not valid JSON ({error}); mend or remove the line") from None
    except RecursionError:
        raise DatasetError(f"{place}: is nested too deeply; mend or remove the line") from None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _fill(row: Row, item: Any, fill: Mapping[str, Sequence[str]]) -> Row:
    """Put names into {{NAME}} and {{AUTHOR}} of a self-cognition row."""
    if not any(fill.values()):
        return row
    is_chinese = isinstance(item, Mapping) and item.get("tag") == "zh"

    def filled(text: str) -> str:
        for name, values in fill.items():
            if values:
                text = text.replace("{{" + name + "}}", values[0 if is_chinese else -1])
        return text

    for key in ("messages", "rejected_messages"):
        if key in row:
            row[key] = [{**message, "content": filled(message["content"])} for message in row[key]]
    return row


def _as_list(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text[:200]
