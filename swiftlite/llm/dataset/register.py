"""Datasets by name: registered in Python, or listed in a JSON file (`--dataset_info`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json

Row = Json


@dataclass(frozen=True)
class DatasetMeta:
    """What `--dataset NAME` stands for: one of path, hf_id, ms_id and load says where the rows are.

    path: local file or directory. hf_id, ms_id: hub ids; with both, `--use_hf` chooses. load: makes the rows.
    subsets, split: what is read of a hub dataset where the user names no subset. columns: old name -> new name.
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
        raise UsageError(f"dataset {name!r} is registered already; choose another name or pass exist_ok=True")
    try:
        meta = DatasetMeta(name, **values)
    except TypeError as error:
        raise UsageError(f"dataset {name!r}: {error}; fields: {', '.join(DatasetMeta.__dataclass_fields__)}") from None
    places = [bool(meta.path), bool(meta.hf_id or meta.ms_id), meta.load is not None]
    if sum(places) != 1:
        raise UsageError(f"dataset {name!r}: give one of path, load, and hub ids (hf_id, ms_id)")
    DATASET_MAPPING[name] = meta
    return meta


# Names of one field in the JSON files of other tools.
_KEYS = {
    "path": ("path", "dataset_path", "file_name"),
    "hf_id": ("hf_id", "hf_dataset_id", "hf_hub_url"),
    "ms_id": ("ms_id", "ms_dataset_id", "ms_hub_url"),
}


def register_dataset_info(file: str) -> list[str]:
    """Register the datasets of a JSON file: {name: {...}}, or a list of entries that have `dataset_name`.

    An entry has path (relative to the file), hf_id or ms_id, and may have columns, subsets, split. The names of
    ms-swift (dataset_path, hf_dataset_id, ms_dataset_id) and LLaMA-Factory (file_name, hf_hub_url, ms_hub_url, tags,
    ranking; its columns are read the other way round) are understood; other keys are told.
    Returns: the names. Raises: UsageError naming file and entry.
    """
    path = Path(file).expanduser()
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--dataset_info {file}: cannot be read ({one_line(error)}); give a JSON file") from None
    if isinstance(entries, Mapping):
        entries = [
            {"dataset_name": name, **entry} if isinstance(entry, Mapping) else entry for name, entry in entries.items()
        ]
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UsageError(f"--dataset_info {file}: must hold {{name: {{...}}}}, or a list of objects; fix the file")
    names = []
    for entry in entries:
        try:
            names.append(_register_entry(entry, path))
        except (UsageError, TypeError, AttributeError) as error:  # values of a wrong type
            where = ascii(entry.get("dataset_name"))
            reason = error if isinstance(error, UsageError) else f"entry {where} has a value of a wrong type ({error})"
            raise UsageError(f"--dataset_info {file}: {reason}") from None
    return names


def _register_entry(entry: Json, file: Path) -> str:
    values: Json = {key: next((entry[name] for name in names if entry.get(name)), None) for key, names in _KEYS.items()}
    name = str(entry.get("dataset_name") or values["ms_id"] or values["hf_id"] or values["path"])
    if values["path"]:
        values["path"] = str(file.parent / Path(values["path"]).expanduser())
    if values["path"] and (values["hf_id"] or values["ms_id"]):  # a local copy is nearer
        gone = ("hf_id", "ms_id") if Path(values["path"]).exists() else ("path",)
        values.update(dict.fromkeys(gone))
    columns = dict(entry.get("columns") or {})
    tags = entry.get("tags")
    if tags or any(key in entry for key in ("file_name", "hf_hub_url", "ms_hub_url", "formatting", "ranking")):
        columns = {old: _STANDARD.get(new, new) for new, old in columns.items()}
    subsets = entry.get("subsets") or ([entry["subset"]] if entry.get("subset") else [])
    split = entry.get("split") or "train"
    unknown = sorted(set(entry) - _KNOWN)
    if unknown:
        get_logger().warning("%s: %s has keys that are not read: %s", file, ascii(name), ascii(", ".join(unknown)))
    meta = register_dataset(
        name, exist_ok=True, columns=columns, subsets=tuple(subsets),
        split=split if isinstance(split, str) else split[0],
        preprocess=_tag_reader({**_TAGS, **tags}) if tags else None, **values,
    )  # fmt: skip
    return meta.name


# LLaMA-Factory's names of columns.
_STANDARD = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
# Its names of what a message consists of, with the values that they have where an entry says nothing.
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "tool_call",
    "system_tag": "system",
}  # fmt: skip
# dataset_name, dataset_description, help, huge_dataset and formatting say nothing that the rows do not.
_KNOWN = {
    *(name for names in _KEYS.values() for name in names), "dataset_name", "columns", "tags", "ranking", "subset",
    "subsets", "split", "formatting", "dataset_description", "help", "huge_dataset",
}  # fmt: skip


def _tag_reader(tags: Mapping[str, str]) -> Callable[[Row], Row]:
    """Rows whose messages have keys and roles of their own -> role and content."""
    roles = {tags[tag]: role for tag, role in _ROLE_TAGS.items()}
    role_key, content_key = tags["role_tag"], tags["content_tag"]

    def message(value: object) -> object:
        if not isinstance(value, Mapping) or role_key not in value:
            return value
        rest = {key: inner for key, inner in value.items() if key not in (role_key, content_key)}
        role = value[role_key]
        return {**rest, "role": roles.get(role, role) if isinstance(role, str) else role,
                "content": value.get(content_key)}  # fmt: skip

    def preprocess(row: Row) -> Row:
        out = dict(row)
        for key in ("conversations", "messages", "chosen", "rejected"):
            value = out.get(key)
            if isinstance(value, list):
                out[key] = [message(inner) for inner in value]
            elif value is not None:
                out[key] = message(value)
        return out

    return preprocess
