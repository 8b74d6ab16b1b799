"""Where rows come from: local files and directories, hubs, registered datasets. Rows are raw here, whatever they hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.files import (
    Item,
    cause,
    file_reader,
    iterable_reader,
    one_split,
    processes,
    saved_reader,
    table_reader,
)
from swiftlite.llm.dataset.folder import split_files
from swiftlite.llm.dataset.register import DATASET_MAPPING, DatasetMeta
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.types import Json

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """Rows in a fixed order. `read(start)` yields them from the start-th on, as (place, row). files: local, of the rows."""

    name: str
    read: Callable[[int], Iterator[Item]]
    columns: Mapping[str, str] = field(default_factory=dict)
    preprocess: Callable[[Json], Json | None] | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A parsed `--dataset` word: `[hf::|ms::]ID[:SUBSET/SUBSET][#N]`. hub: 'hf', 'ms' or None (not said).

    `#<N`: at most N rows, where `#N` takes some of them twice if there are fewer.
    """

    text: str
    name: str
    hub: str | None = None
    subsets: tuple[str, ...] = ()
    count: int | None = None
    at_most: bool = False


def parse_spec(text: str) -> Spec:
    """Raises: UsageError for a number of rows that is none."""
    path = Path(text).expanduser()
    if path.exists():
        return Spec(text, str(path))
    name, count = text, None
    at_most = "#<" in text
    if "#" in text:
        name, _, number = text.rpartition("#")
        number = number.removeprefix("<")
        if not number.isdigit() or int(number) < 1:
            raise UsageError(f"--dataset {text}: {number!r} after # is not a number of rows; write NAME#500")
        count = int(number)
        if Path(name).expanduser().exists():
            return Spec(text, str(Path(name).expanduser()), count=count, at_most=at_most)
    hub = next((hub for hub in ("hf", "ms") if name.lower().startswith(f"{hub}::")), None)
    name = name[4:] if hub else name
    subsets: tuple[str, ...] = ()
    if ":" in name:
        name, _, listed = name.partition(":")
        subsets = tuple(part for part in listed.split("/") if part)
    if Path(name).expanduser().exists() and not hub:
        name = str(Path(name).expanduser())
    return Spec(text, name, hub, subsets, count, at_most)


def open_spec(
    spec: Spec, *, use_hf: bool = False, streaming: bool = False, num_proc: int = 1, hub_token: str | None = None
) -> list[Source]:
    """The sources of a `--dataset` word, one per subset.

    Raises: DatasetError for what is not there or cannot be read; UsageError for words that fit nothing.
    """
    if not spec.hub and Path(spec.name).exists():
        return [file_source(Path(spec.name), streaming, num_proc, subset) for subset in spec.subsets or (None,)]
    meta = DATASET_MAPPING.get(spec.name)
    if meta is not None and not spec.hub:
        return _registered(spec, meta, use_hf, streaming, num_proc, hub_token)
    if not _HUB_ID.fullmatch(spec.name):
        known = f"; registered: {', '.join(sorted(DATASET_MAPPING)[:10])}" if DATASET_MAPPING else ""
        raise DatasetError(
            f"--dataset {spec.text}: no such file or directory; give a local .jsonl, .json, .csv, .tsv, .parquet "
            f"or .txt file, a directory, or a hub id like owner/name{known}"
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
        sources = [Source(meta.name, iterable_reader(meta.name, meta.load))]
    elif meta.path is not None:
        path = Path(meta.path).expanduser()
        if not path.exists():
            raise DatasetError(f"--dataset {spec.text}: registered as {path}, which does not exist")
        subsets = spec.subsets or meta.subsets or (None,)
        sources = [file_source(path, streaming, num_proc, subset, meta.split) for subset in subsets]
    else:
        hub = "hf" if meta.hf_id and (use_hf or not meta.ms_id) else "ms"
        hub_id = str(meta.hf_id if hub == "hf" else meta.ms_id)
        subsets = spec.subsets or meta.subsets or (None,)
        sources = [hub_source(hub, hub_id, subset, meta.split, streaming, num_proc, token) for subset in subsets]
    return [replace(source, columns=meta.columns, preprocess=meta.preprocess) for source in sources]


# ---- local ----


def file_source(
    path: Path, streaming: bool = False, num_proc: int = 1, subset: str | None = None, split: str = "train"
) -> Source:
    """A file, or a split of a directory: files as hubs lay them out, or what `datasets.save_to_disk` wrote."""
    if path.is_file():
        return Source(str(path), file_reader(path, streaming, num_proc), files=(path,))
    saved = path / subset if subset else path
    if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
        return Source(str(saved), saved_reader(saved, split), files=tuple(sorted(saved.rglob("*.arrow"))))
    files = tuple(split_files(path, subset, split))
    readers = [file_reader(file, streaming, num_proc) for file in files]

    def read(start: int) -> Iterator[Item]:
        skipped = 0
        for reader in readers:
            for item in reader(0):
                if skipped < start:
                    skipped += 1
                else:
                    yield item

    return Source(str(path), read if len(readers) > 1 else readers[0], files=files)


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
    """A dataset of Hugging Face ('hf') or ModelScope ('ms'); fetched when the first row is asked for."""
    name = f"{hub}::{hub_id}" + (f":{subset}" if subset else "")
    load = _load_hf if hub == "hf" else _load_ms

    def fetch() -> Any:
        try:
            return one_split(load(hub_id, subset, streaming, num_proc, token), name, split)
        except DatasetError:
            raise
        except Exception as error:  # the hubs' clients raise many kinds
            other = "ms::" if hub == "hf" else "hf::"
            raise DatasetError(
                f"--dataset {name}: cannot be fetched ({cause(error)}); check the id, the subset and the network, or "
                f"try {other}{hub_id}"
            ) from error

    return Source(name, table_reader(name, fetch))


def _load_hf(hub_id: str, subset: str | None, streaming: bool, num_proc: int, token: str | None) -> Any:
    import datasets

    options = {"streaming": streaming, "token": token, **processes(streaming, num_proc)}
    loaded = datasets.load_dataset(hub_id, subset, **options)
    first = next(iter(loaded.values())) if isinstance(loaded, Mapping) else loaded
    if getattr(first.info, "builder_name", None) == "csv":
        # Cells are text: "02116" is not a number and "NA" is not missing.
        features = datasets.Features(
            {name: datasets.Value("string") for name in first.column_names or next(iter(first))}
        )
        loaded = datasets.load_dataset(hub_id, subset, **options, features=features, keep_default_na=False)
    return loaded


def _load_ms(hub_id: str, subset: str | None, streaming: bool, num_proc: int, token: str | None) -> Any:
    """ModelScope's datasets are repositories in Hugging Face's layout: fetched whole, then read as local ones."""
    from modelscope import dataset_snapshot_download

    folder = dataset_snapshot_download(hub_id, **({"token": token} if token else {}))
    return _load_hf(folder, subset, streaming, num_proc, None)
