"""Readers of data files: JSONL, JSON, CSV, TSV and text need no package; Parquet and saved tables are read by `datasets`.

A reader yields (place, row): "file:line", and the raw row, or a RowError that says why the row cannot be used. What a
reader gives is what the file holds: cells of CSV are text, keys that Arrow has filled with null are left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json

Item = tuple[str, object]
Reader = Callable[[int], Iterator[Item]]  # read(start): rows from the start-th on

# A longer line is skipped without being read as a whole: parsing takes several times its size.
_MAX_LINE_BYTES = 128 * 2**20


def file_reader(path: Path, streaming: bool = False, num_proc: int = 1) -> Reader:
    """The reader of one file. Raises: DatasetError for an ending that is unknown."""
    read = _READERS.get(path.suffix.lower())
    if read is not None:
        return lambda start: islice(read(path), start, None)
    if path.suffix.lower() != ".parquet":
        raise DatasetError(f"{path}: ending {path.suffix!r} is unknown; known: {', '.join(ENDINGS)}")

    def load() -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=streaming, **processes(streaming, num_proc)
            )
        except Exception as error:  # datasets raises many kinds; all mean that the file is not what its ending says
            raise DatasetError(f"{path}: cannot be read as parquet ({cause(error)}); check the file") from error

    return table_reader(str(path), load)


def saved_reader(path: Path, split: str = "train") -> Reader:
    """A split of what `datasets.save_to_disk` wrote."""

    def load() -> Any:
        import datasets

        try:
            return one_split(datasets.load_from_disk(str(path)), str(path), split)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot be read as a saved dataset ({cause(error)})") from error

    return table_reader(str(path), load)


def one_split(loaded: Any, name: str, split: str) -> Any:
    """One split of what was loaded: the wanted one, or the only one."""
    if not isinstance(loaded, Mapping):
        return loaded
    if split in loaded:
        return loaded[split]
    if len(loaded) == 1:
        only = next(iter(loaded))
        get_logger().warning("%s: has no split %s; its only one is taken: %s", name, split, only)
        return loaded[only]
    raise DatasetError(
        f"{name}: has splits {', '.join(map(str, loaded))}, none of them {split!r}; register it with split"
    )


def processes(streaming: bool, num_proc: int) -> Json:
    return {} if streaming or num_proc <= 1 else {"num_proc": num_proc}


def cause(error: BaseException) -> str:
    return one_line(error.__cause__ or error)


# ---- tables ----


def table_reader(name: str, load: Callable[[], Any]) -> Reader:
    """Rows of a `datasets` object, map-style or streamed."""

    def read(start: int) -> Iterator[Item]:
        table = load()
        try:
            if start:
                table = table.skip(start)
            for number, row in enumerate(table, start=start + 1):
                yield f"{name} row {number}", without_nulls(row)
        except DatasetError:
            raise
        except Exception as error:  # streamed files are parsed on the way
            raise DatasetError(f"{name}: cannot be read on ({cause(error)}); check the file") from error

    return read


def iterable_reader(name: str, load: Callable[[], Iterable[object]]) -> Reader:
    """Rows that a registered function makes; it may return a `datasets` object too."""

    def read(start: int) -> Iterator[Item]:
        rows = load()
        from_arrow = type(rows).__module__.partition(".")[0] == "datasets"
        for number, row in enumerate(islice(iter(rows), start, None), start=start + 1):
            yield f"{name} row {number}", without_nulls(row) if from_arrow else row

    return read


def without_nulls(value: object) -> object:
    """A value from Arrow without the keys that are null: Arrow gives each object the keys of all others.

    A null inside a list stays: lists are not filled.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


# ---- JSON ----


def _lines(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """("file:line", line) of lines that are not blank; None for a line that is too long."""
    number = 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            number += 1
            whole = len(line) < _MAX_LINE_BYTES or line.endswith(b"\n")
            while not whole:
                rest = file.readline(_MAX_LINE_BYTES)
                whole = not rest or rest.endswith(b"\n")
                line = b""
            if not line:
                yield f"{path}:{number}", None
            elif line.strip():
                yield f"{path}:{number}", line


def _too_long() -> RowError:
    return RowError("line too long", f"more than {_MAX_LINE_BYTES:,} bytes; divide the row")


def _read_jsonl(path: Path) -> Iterator[Item]:
    for place, line in _lines(path):
        yield place, _too_long() if line is None else _parse_line(line)


def _parse_line(line: bytes) -> object:
    """The value of a line, or the RowError that says why there is none."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("not UTF-8", f"{error.reason} at byte {error.start}", _shown(line))
    except ValueError as error:
        return RowError("not valid JSON", str(error), _shown(line))
    except RecursionError:
        return RowError("nested too deeply", "", _shown(line))


def _shown(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\n")


def _read_json(path: Path) -> Iterator[Item]:
    """A list of rows, one row, or in fact JSONL."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Several values, one a line? Where the first line stands alone, its own reader names the faulty line.
        first = text.lstrip().partition("\n")[0]
        if not first.startswith("{") or isinstance(_parse_line(first.encode()), RowError):
            raise DatasetError(f"{path}: is not valid JSON ({error}); fix the file") from None
        yield from _read_jsonl(path)
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


# ---- CSV, TSV, text ----


def _read_table(path: Path, delimiter: str) -> Iterator[Item]:
    """Cells are the characters of the file; an empty cell says nothing, as a missing key does in JSON."""
    csv.field_size_limit(_MAX_LINE_BYTES)
    # Bytes that are not UTF-8 arrive as lone surrogates and cost their own row only.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path}:{rows.line_num + 1}"
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                # An open quote swallows the rest of the file: that does not concern one row alone.
                if header is None or "end of data" in str(error) or "field limit" in str(error):
                    raise DatasetError(
                        f"{place}: cannot be read as CSV ({error}); a quote that opens here is not closed, or there is "
                        "no line of column names"
                    ) from None
                yield place, RowError("not valid CSV", str(error))
                continue
            if not any(cells):
                continue
            is_text = _is_text("".join(cells))
            if header is None:
                if not is_text:
                    raise DatasetError(f"{path}: is not UTF-8; convert the file")
                header = cells
                twice = next((name for name in cells if name and cells.count(name) > 1), None)
                if twice is not None:
                    raise DatasetError(f"{path}: two columns are named {ascii(twice)[:80]}; rename or delete one")
            elif not is_text:
                yield place, RowError("not UTF-8")
            elif len(cells) > len(header):
                yield place, RowError("more cells than columns", f"{len(cells)} cells, {len(header)} columns")
            else:
                yield place, {name: cell for name, cell in zip(header, cells, strict=False) if cell}


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> Iterator[Item]:
    """One row a line."""
    for place, line in _lines(path):
        if line is None:
            yield place, _too_long()
            continue
        try:
            yield place, {"text": line.decode("utf-8-sig").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield place, RowError("not UTF-8", f"{error.reason} at byte {error.start}", _shown(line))


_READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda path: _read_table(path, ","),
    ".tsv": lambda path: _read_table(path, "\t"),
    ".txt": _read_text,
}
# What a data file's name may end in.
ENDINGS = (*_READERS, ".parquet")
