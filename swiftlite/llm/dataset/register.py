"""Data sets by name: registered in Python, or listed in a JSON file (`--dataset_info`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.utils.errors import UsageError

Row = dict[str, Any]


@dataclass(frozen=True)
class DatasetMeta:
    """What `--dataset NAME` stands for: one of path, hf_id, ms_id and load says where the rows are.

    path: local file or directory. hf_id, ms_id: hub ids; with both, `--use_hf` chooses. load: makes the rows.
    subsets, split: what is read of a hub data set where the user names no subset. columns: old name -> new name.
    preprocess: row -> row in any known form, or None to leave it out (counted); it sees the renamed columns.
    """

    name: str
    path: str | None = None
    hf_id: str | None = None
    ms_id: str | None = None
    load: Callable[[], Iterable[Row]] | None = None
    subsets: tuple[str, ...] = ()
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)
    preprocess: Callable[[Row], Row | None] | None = None


DATASET_MAPPING: dict[str, DatasetMeta] = {}


def register_dataset(name: str, *, exist_ok: bool = False, **values: Any) -> DatasetMeta:
    """Register what `--dataset NAME` stands for, see DatasetMeta.

    `register_dataset("sums", load=lambda: [{"query": "1+1", "response": "2"}])` in a file that
    `--custom_register_path` names.
    Raises: UsageError if the name is taken, or not exactly one kind of place is given.
    """
    if name in DATASET_MAPPING and not exist_ok:
        raise UsageError(f"data set {name!r} is registered already; choose another name or pass exist_ok=True")
    try:
        meta = DatasetMeta(name, **values)
    except TypeError as error:
        raise UsageError(f"data set {name!r}: {error}; fields: {', '.join(DatasetMeta.__dataclass_fields__)}") from None
    places = [bool(meta.path), bool(meta.hf_id or meta.ms_id), meta.load is not None]
    if sum(places) != 1:
        raise UsageError(f"data set {name!r}: give one of path, load, and hub ids (hf_id, ms_id)")
    DATASET_MAPPING[name] = meta
    return meta


# Names of one field in the JSON files of other tools.
_KEYS = {
    "path": ("path", "dataset_path", "file_name"),
    "hf_id": ("hf_id", "hf_dataset_id", "hf_hub_url"),
    "ms_id": ("ms_id", "ms_dataset_id", "ms_hub_url"),
}


def register_dataset_info(file: str) -> list[str]:
    """Register the data sets of a JSON file: {name: {...}}, or a list of entries that have `dataset_name`.

    An entry has path (relative to the file), hf_id or ms_id, and may have columns, subsets, split. The names of
    ms-swift (dataset_path, hf_dataset_id, ms_dataset_id) and LLaMA-Factory (file_name, hf_hub_url, ms_hub_url; its
    columns are read the other way round) are understood.
    Returns: the names. Raises: UsageError naming file and entry.
    """
    path = Path(file).expanduser()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--dataset_info {file}: cannot be read ({error}); give a JSON file") from None
    if isinstance(entries, Mapping):
        entries = [{"dataset_name": name, **entry} for name, entry in entries.items()]
    names = []
    for entry in entries:
        values: dict[str, Any] = {
            key: next((entry[name] for name in names_ if entry.get(name)), None) for key, names_ in _KEYS.items()
        }
        name = entry.get("dataset_name") or values["ms_id"] or values["hf_id"] or values["path"]
        if values["path"] and (values["hf_id"] or values["ms_id"]):  # a local copy is nearer
            values["hf_id"] = values["ms_id"] = None
        if values["path"] and not Path(values["path"]).is_absolute():
            values["path"] = str(path.parent / values["path"])
        columns = dict(entry.get("columns") or {})
        if "file_name" in entry or "hf_hub_url" in entry or "ms_hub_url" in entry or "formatting" in entry:
            columns = {old: _STANDARD.get(new, new) for new, old in columns.items()}
        subsets = entry.get("subsets") or ([entry["subset"]] if entry.get("subset") else [])
        split = entry.get("split") or "train"
        try:
            register_dataset(
                str(name), exist_ok=True, columns=columns, subsets=tuple(subsets),
                split=split if isinstance(split, str) else split[0], **values,
            )  # fmt: skip
        except UsageError as error:
            raise UsageError(f"--dataset_info {file}: {error}") from None
        names.append(str(name))
    return names


# LLaMA-Factory's names of columns.
_STANDARD = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
