"""Which files of a folder are trained on: what a hub's conventions call the training split.

As Hugging Face's `datasets` decides it: `configs` in README.md; else names of splits in the names of folders, else in
those of files; else every data file. Files that are not taken are named in the log.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from swiftlite.llm.dataset.files import ENDINGS
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import one_line, some
from swiftlite.utils.types import Json

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# A keyword stands between the ends of a name and these characters.
_SPLITS = {
    split: re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", re.IGNORECASE)
    for split, words in _KEYWORDS.items()
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*\..+")
# Endings of one kind of file; where several kinds are there, the most frequent one counts, then the first. Text only
# counts alone: notes and licences are text.
_KINDS = ((".jsonl", ".json"), (".parquet",), (".csv", ".tsv"), (".txt",))
_NO_DATA = re.compile(
    r"(licen[cs]es?|notice|readme|requirements|constraints|citation|authors|contributors|contributing|changelog|changes|"
    r"copying|copyright|version|todo|install|manifest|cmakelists|robots)\b.*\.txt|(licen[cs]e|readme)[-_.].*|"
    r"(config|dataset_infos?|dataset_dict|state|package|package-lock|tsconfig|args|tokenizer|tokenizer_config|"
    r"special_tokens_map|generation_config|vocab|added_tokens)\.json|.*\.index\.json|(rejects|logging)\.jsonl",
    re.IGNORECASE,
)


def split_files(folder: Path, subset: str | None = None, split: str = "train") -> list[Path]:
    """The files of a split, in order of name. subset: a configuration of README.md, or a folder in it.

    Raises: DatasetError where there is no such split; it names what is there.
    """
    patterns: Mapping[str, Sequence[str]] | None = None
    root = folder
    configs = _configs(folder)
    chosen = _choose(folder, configs, subset)
    if chosen is not None:
        root = _inside(folder, str(chosen.get("data_dir") or "."))
        if chosen.get("data_files"):
            patterns = _patterns(folder, chosen["data_files"])
    elif subset is not None:
        root = folder / subset
        if not root.is_dir():
            known = f"; README.md names {', '.join(configs)}" if configs else ""
            raise DatasetError(f"--dataset {folder}:{subset}: no such subset or folder{known}")
    files = list(_data_files(root))
    splits = _by_patterns(root, patterns) if patterns is not None else _by_names(root, files)
    taken = sorted(splits.get(split) or ())
    if not taken and len(splits) == 1 and not any(rule.search(next(iter(splits))) for rule in _SPLITS.values()):
        taken = sorted(next(iter(splits.values())))
    if not taken:
        there = "; ".join(f"{name}: {_names(root, found)}" for name, found in sorted(splits.items()) if found)
        raise DatasetError(
            f"{folder}: holds no split {split} (it has {there}); name the file that is to be read"
            if there
            else f"{folder}: holds no data files; known endings: {', '.join(ENDINGS)}"
        )
    left = [file for file in files if file not in set(taken)]
    get_logger().info("%s: its split %s is %s", folder, split, _names(root, taken))
    if left:
        get_logger().warning("%s: not read: %s; name a file to read it", folder, _names(root, left))
    return taken


def _names(root: Path, files: Sequence[Path]) -> str:
    return some((ascii(file.relative_to(root).as_posix())[1:-1][:80] for file in sorted(files)), 5)


def _data_files(root: Path) -> Iterator[Path]:
    for file in sorted(root.rglob("*")):
        parts = file.relative_to(root).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if file.suffix.lower() in ENDINGS and not hidden and not _NO_DATA.fullmatch(file.name) and file.is_file():
            yield file


def _by_names(root: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Split -> files, by the first rule that fits any file; all files are the training split where none does."""

    def shard(file: Path) -> list[str]:
        match = _SHARD.fullmatch(file.relative_to(root).as_posix())
        return [match[1]] if match else []

    def folders(file: Path) -> list[str]:
        parts = file.relative_to(root).parts[:-1]
        return [split for split, rule in _SPLITS.items() if any(rule.search(part) for part in parts)]

    def name(file: Path) -> list[str]:
        return [split for split, rule in _SPLITS.items() if rule.search(file.name)]

    found: dict[str, list[Path]] = {}
    for rule in (shard, folders, name):
        for file in files:
            for split in rule(file):
                found.setdefault(split, []).append(file)
        if found:
            break
    found = found or {"train": list(files)}
    return {split: _of_one_kind(members) for split, members in found.items() if members}


def _of_one_kind(files: Sequence[Path]) -> list[Path]:
    """The same rows often lie there in several formats."""
    kinds = Counter(next(i for i, kind in enumerate(_KINDS) if file.suffix.lower() in kind) for file in files)
    text = len(_KINDS) - 1
    best = min(kinds, key=lambda kind: (kind == text, -kinds[kind], kind))
    return [file for file in files if file.suffix.lower() in _KINDS[best]]


# ---- README.md ----


def _configs(folder: Path) -> dict[str, Json]:
    """`configs` of README.md's header by name, {} where it names none."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    text = path.read_bytes()[: 2**20].decode("utf-8-sig", "replace").replace("\r\n", "\n")
    header = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    if header is None:
        return {}
    import yaml

    try:
        facts = yaml.safe_load(header[1])
        configs = facts.get("configs") if isinstance(facts, dict) else None
        return {str(config["config_name"]): dict(config) for config in configs or ()}
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path}: its header cannot be read ({one_line(error)}); fix it, or name the files that are to be read"
        ) from None


def _choose(folder: Path, configs: Mapping[str, Json], subset: str | None) -> Json | None:
    if subset is not None:
        return configs.get(subset)
    if len(configs) <= 1:
        return next(iter(configs.values()), None)
    default = next((config for config in configs.values() if config.get("default")), configs.get("default"))
    if default is None:
        raise DatasetError(f"{folder}: has subsets {', '.join(configs)}; choose with {folder}:NAME")
    return default


def _patterns(folder: Path, data_files: object) -> dict[str, list[str]]:
    """`data_files` in any of its forms as split -> patterns of files."""
    if isinstance(data_files, str):
        data_files = {"train": data_files}
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found: dict[str, list[str]] = {}
    for entry in data_files if isinstance(data_files, list) else [None]:
        if isinstance(entry, str):
            entry = {"split": "train", "path": entry}
        entry = entry if isinstance(entry, Mapping) else {}
        paths = entry.get("path")
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise DatasetError(f"{folder / 'README.md'}: data_files must be paths or {{split, path}}; fix it")
        found.setdefault(str(entry.get("split") or "train"), []).extend(paths)
    return found


def _by_patterns(root: Path, patterns: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for split, listed in patterns.items():
        for pattern in listed:
            _inside(root, pattern)
            matches = [file for file in sorted(root.glob(pattern)) if file.is_file()]
            if not matches and (root / pattern).is_dir():
                matches = list(_data_files(root / pattern))
            if not matches:
                raise DatasetError(f"{root / 'README.md'}: no file fits {pattern!r} of split {split}; fix it")
            known = found.setdefault(split, [])
            known += [file for file in matches if file not in known]
    return found


def _inside(root: Path, name: str) -> Path:
    """A path that README.md names: below the folder, nowhere else."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "://" in name:
        raise DatasetError(
            f"{root / 'README.md'}: names {name!r}, which is not below its folder; name the files yourself"
        )
    return root / name
