"""Where rows come from: local files and directories, hubs, registered data sets. Rows are raw here, whatever they hold.

JSONL and JSON need no package; CSV, Parquet and text are read through `datasets`, imported only then.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.register import DATASET_MAPPING, DatasetMeta
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger

# File ending -> builder name of `datasets`; None: read here.
READERS: dict[str, str | None] = {".jsonl": None, ".json": None, ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

Item = tuple[str, Any]  # where a row stands ("file:line"), and the row, or a RowError for one that cannot be read
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Rows in a fixed order. `read(start)` yields them from the start-th on, as (place, row)."""

    name: str
    read: Callable[[int], Iterator[Item]]
    columns: Mapping[str, str] = field(default_factory=dict)
    preprocess: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None


@dataclass(frozen=True)
class Spec:
    """A parsed `--dataset` word: `[hf::|ms::]ID[:SUBSET/SUBSET][#N]`. hub: 'hf', 'ms' or None (not said)."""

    text: str
    name: str
    hub: str | None = None
    subsets: tuple[str, ...] = ()
    count: int | None = None


def parse_spec(text: str) -> Spec:
    """Raises: UsageError for a number of rows that is none."""
    path = Path(text).expanduser()
    if path.exists():
        return Spec(text, str(path))
    name, count = text, None
    if "#" in text:
        name, _, number = text.rpartition("#")
        if not number.isdigit() or int(number) < 1:
            raise UsageError(f"--dataset {text}: {number!r} after # is no number of rows; write NAME#500")
        count = int(number)
        if Path(name).expanduser().exists():
            return Spec(text, str(Path(name).expanduser()), count=count)
    hub = next((hub for hub in ("hf", "ms") if name.lower().startswith(f"{hub}::")), None)
    name = name[4:] if hub else name
    subsets: tuple[str, ...] = ()
    if ":" in name:
        name, _, listed = name.partition(":")
        subsets = tuple(part for part in listed.split("/") if part)
    if Path(name).expanduser().exists() and not hub:
        name = str(Path(name).expanduser())
    return Spec(text, name, hub, subsets, count)


def open_spec(
    spec: Spec, *, use_hf: bool = False, streaming: bool = False, num_proc: int = 1, hub_token: str | None = None
) -> list[Source]:
    """The sources of a `--dataset` word, one per subset.

    Raises: DatasetError for what is not there or cannot be read; UsageError for words that fit nothing.
    """
    if not spec.hub and Path(spec.name).exists():
        return [file_source(Path(spec.name), streaming, num_proc, spec.subsets)]
    meta = DATASET_MAPPING.get(spec.name)
    if meta is not None and not spec.hub:
        return _registered(spec, meta, use_hf, streaming, num_proc, hub_token)
    if not _HUB_ID.fullmatch(spec.name):
        known = f"; registered: {', '.join(sorted(DATASET_MAPPING)[:10])}" if DATASET_MAPPING else ""
        raise DatasetError(
            f"--dataset {spec.text}: no such file or directory; give a local .jsonl, .json, .csv, .parquet or .txt "
            f"file, a directory, or a hub id like owner/name{known}"
        )
    hub = spec.hub or ("hf" if use_hf else "ms")
    return [
        hub_source(hub, spec.name, subset, "train", streaming, num_proc, hub_token)
        for subset in spec.subsets or (None,)
    ]


def _registered(
    spec: Spec, meta: DatasetMeta, use_hf: bool, streaming: bool, num_proc: int, token: str | None
) -> list[Source]:
    if meta.load is not None:
        sources = [Source(meta.name, _read_iterable(meta.name, meta.load))]
    elif meta.path is not None:
        path = Path(meta.path).expanduser()
        if not path.exists():
            raise DatasetError(f"--dataset {spec.text}: registered as {path}, which does not exist")
        sources = [file_source(path, streaming, num_proc, spec.subsets)]
    else:
        hub = "hf" if meta.hf_id and (use_hf or not meta.ms_id) else "ms"
        hub_id = str(meta.hf_id if hub == "hf" else meta.ms_id)
        subsets = spec.subsets or meta.subsets or (None,)
        sources = [hub_source(hub, hub_id, subset, meta.split, streaming, num_proc, token) for subset in subsets]
    return [Source(source.name, source.read, meta.columns, meta.preprocess) for source in sources]


# ---- local ----


def file_source(path: Path, streaming: bool = False, num_proc: int = 1, subsets: Sequence[str] = ()) -> Source:
    """A file, or a directory: its data files in order of name, or what `datasets.save_to_disk` wrote."""
    if path.is_file():
        return Source(str(path), _file_reader(path, streaming, num_proc))
    if subsets:
        path = path / subsets[0] if len(subsets) == 1 else path
        if len(subsets) > 1 or not path.is_dir():
            raise UsageError(
                f"--dataset {path}: a local directory has no subsets; name the files or folders themselves"
            )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Source(str(path), _saved_reader(path))
    files = sorted(file for file in path.iterdir() if file.suffix in READERS and file.is_file())
    if not files:  # as hubs lay them out: data/train-00000.parquet
        files = sorted(file for file in path.rglob("*") if file.suffix in READERS and _is_data(file, path))
    if not files:
        raise DatasetError(f"{path}: holds no data files; known endings: {', '.join(READERS)}")
    readers = [_file_reader(file, streaming, num_proc) for file in files]

    def read(start: int) -> Iterator[Item]:
        skipped = 0
        for reader in readers:
            for item in reader(0):
                if skipped < start:
                    skipped += 1
                else:
                    yield item

    return Source(str(path), read if len(readers) > 1 else readers[0])


def _is_data(file: Path, root: Path) -> bool:
    parts = file.relative_to(root).parts
    return file.is_file() and not any(part.startswith(".") for part in parts)


def _file_reader(path: Path, streaming: bool, num_proc: int) -> Callable[[int], Iterator[Item]]:
    if path.suffix == ".jsonl":
        return lambda start: _read_jsonl(path, start)
    if path.suffix == ".json":
        return lambda start: islice(_read_json(path), start, None)
    builder = READERS.get(path.suffix)
    if builder is None:
        raise DatasetError(f"{path}: ending {path.suffix!r} is unknown; known: {', '.join(READERS)}")

    def load() -> Any:
        import datasets

        try:
            return datasets.load_dataset(
                builder, data_files=str(path), split="train", streaming=streaming, **_processes(streaming, num_proc)
            )
        except Exception as error:  # datasets raises many kinds; all mean that the file is not what its ending says
            raise DatasetError(f"{path}: cannot be read as {builder} ({_one_line(error)}); check the file") from error

    return _table_reader(str(path), load)


def _saved_reader(path: Path) -> Callable[[int], Iterator[Item]]:
    def load() -> Any:
        import datasets

        try:
            return _one_split(datasets.load_from_disk(str(path)), str(path), "train")
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot be read as a saved data set ({_one_line(error)})") from error

    return _table_reader(str(path), load)


def _processes(streaming: bool, num_proc: int) -> dict[str, Any]:
    return {} if streaming or num_proc <= 1 else {"num_proc": num_proc}


def _table_reader(name: str, load: Callable[[], Any]) -> Callable[[int], Iterator[Item]]:
    """Rows of a `datasets` object, map-style or streamed."""

    def read(start: int) -> Iterator[Item]:
        table = load()
        try:
            if start:
                table = table.skip(start)
            for number, row in enumerate(table, start=start + 1):
                yield f"{name} row {number}", row
        except DatasetError:
            raise
        except Exception as error:  # streamed files are parsed on the way
            raise DatasetError(f"{name}: cannot be read on ({_one_line(error)}); check the file") from error

    return read


def _read_iterable(name: str, load: Callable[[], Iterable[Any]]) -> Callable[[int], Iterator[Item]]:
    def read(start: int) -> Iterator[Item]:
        for number, row in enumerate(islice(iter(load()), start, None), start=start + 1):
            yield f"{name} row {number}", row

    return read


def _read_jsonl(path: Path, start: int = 0) -> Iterator[Item]:
    skipped = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if skipped < start:
                skipped += 1
                continue
            yield f"{path}:{number}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
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
            raise DatasetError(f"{path}: is not valid JSON ({error}); mend the file") from None
        yield from _read_jsonl(path)
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


# ---- hubs ----


def hub_source(
    hub: str,
    hub_id: str,
    subset: str | None,
    split: str,
    streaming: bool = False,
    num_proc: int = 1,
    token: str | None = None,
) -> Source:
    """A data set of Hugging Face ('hf') or ModelScope ('ms'); fetched when the first row is asked for."""
    name = f"{hub}::{hub_id}" + (f":{subset}" if subset else "")
    load = _load_hf if hub == "hf" else _load_ms

    def fetch() -> Any:
        try:
            return _one_split(load(hub_id, subset, streaming, num_proc, token), name, split)
        except DatasetError:
            raise
        except Exception as error:  # the hubs' clients raise many kinds
            other = "ms::" if hub == "hf" else "hf::"
            raise DatasetError(
                f"--dataset {name}: cannot be fetched ({_one_line(error)}); check the id, the subset and the network, or "
                f"try {other}{hub_id}"
            ) from error

    return Source(name, _table_reader(name, fetch))


def _load_hf(hub_id: str, subset: str | None, streaming: bool, num_proc: int, token: str | None) -> Any:
    import datasets

    return datasets.load_dataset(hub_id, subset, streaming=streaming, token=token, **_processes(streaming, num_proc))


def _load_ms(hub_id: str, subset: str | None, streaming: bool, num_proc: int, token: str | None) -> Any:
    """ModelScope's data sets are repositories in Hugging Face's layout: fetched whole, then read as local ones."""
    from modelscope import dataset_snapshot_download

    folder = dataset_snapshot_download(hub_id, **({"token": token} if token else {}))
    return _load_hf(folder, subset, streaming, num_proc, None)


def _one_split(loaded: Any, name: str, split: str) -> Any:
    """One split of what was loaded: the wanted one, or the only one."""
    if not isinstance(loaded, Mapping):
        return loaded
    if split in loaded:
        return loaded[split]
    if len(loaded) == 1:
        only = next(iter(loaded))
        get_logger().info("%s: has no split %s; its only one is taken: %s", name, split, only)
        return loaded[only]
    raise DatasetError(
        f"{name}: has splits {', '.join(map(str, loaded))}, none of them {split!r}; register it with split"
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    return text[:200]
