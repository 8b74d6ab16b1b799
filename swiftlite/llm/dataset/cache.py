"""Tokenised data on disk: a cache by content between runs, and data sets that `export --to_cached_dataset` writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swiftlite import __version__
from swiftlite.llm.dataset.encoded import EncodedDataset
from swiftlite.llm.dataset.packing import PackedDataset
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.template.base import Template
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.io import write_json
from swiftlite.utils.logger import get_logger

FACTS_FILE = "cached_dataset.json"
_DROPPED_FILE = "dropped.json"
_SEQUENCES = "sequences"
# Settings of a template that change what a row is encoded as.
_SETTINGS = (
    "default_system", "max_length", "truncation_strategy", "use_chat_template", "loss_scale", "template_backend",
    "enable_thinking", "add_non_thinking_prefix", "agent_template",
)  # fmt: skip


def fingerprint(template: Template) -> dict[str, Any]:
    """What decides how rows are encoded, as plain values; equal ones give equal tokens and labels."""
    facts: dict[str, Any] = {"template": template.template_type, "tokenizer": _tokenizer_hash(template.tokenizer)}
    facts.update({name: getattr(template, name, None) for name in _SETTINGS})
    facts["weights"] = [dict(scale) for scale in template.weights]
    facts["text"] = {**template.meta.describe(), "layout": template.meta.layout}
    if template.template_backend == "jinja":
        facts["chat_template"] = _hash([json.dumps(template.tokenizer.chat_template)])
    facts["version"] = __version__
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def _tokenizer_hash(tokenizer: Any) -> str:
    if getattr(tokenizer, "is_fast", False):
        # Padding and truncation are settings of the last call.
        value = json.loads(tokenizer.backend_tokenizer.to_str())
        value.pop("padding", None), value.pop("truncation", None)
        return _hash([json.dumps(value, sort_keys=True)])
    return _hash([type(tokenizer).__name__, json.dumps(tokenizer.get_vocab(), sort_keys=True)])


def _hash(texts: Iterable[str]) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()


# ---- cache between runs ----


def cache_root() -> Path:
    """`$SWIFTLITE_CACHE`, or ~/.cache/swiftlite."""
    return Path(os.environ.get("SWIFTLITE_CACHE") or "~/.cache/swiftlite").expanduser()


def encode_cached(
    rows: list[dict[str, Any]],
    template: Template,
    *,
    max_drop_ratio: float,
    name: str,
    num_proc: int,
    rejects: RejectsFile | None,
) -> EncodedDataset:
    """EncodedDataset of the rows, from the cache where the same rows were encoded in the same way before.

    Of several processes that want the same, one encodes and the others wait for it.
    """
    key = _hash([json.dumps(fingerprint(template)), *(json.dumps(row, default=str) for row in rows)])
    directory = cache_root() / "datasets" / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back when the process ends, however that happens
        if (directory / _DROPPED_FILE).is_file():
            dataset = EncodedDataset.load(directory)
            dropped = json.loads((directory / _DROPPED_FILE).read_text(encoding="utf-8"))
            report = DropReport(total=dropped["total"], rejects=rejects)
            for reason, place, detail, index in dropped["rows"]:
                report.drop(reason, place, detail, rows[index])
            dataset.report, dataset.row_indices = report, dropped["row_indices"]
            get_logger().info("%s: %d samples from the cache %s", name, len(dataset), directory)
            report.check(max_drop_ratio, name)
            return dataset
        dataset = EncodedDataset(
            rows, template, max_drop_ratio=max_drop_ratio, name=name, num_proc=num_proc, rejects=rejects
        )
        scratch = directory.with_name(f".{key}.{os.getpid()}")
        dataset.save(scratch)
        kept = set(dataset.row_indices)
        gone = [i for i in range(len(rows)) if i not in kept]
        write_json(
            scratch / _DROPPED_FILE,
            {
                "total": dataset.report.total,
                "row_indices": dataset.row_indices,
                "rows": [[*entry, index] for entry, index in zip(dataset.report.log or [], gone, strict=True)],
            },
        )
        try:
            scratch.rename(directory)
        except OSError:  # another process was first, with the same content
            shutil.rmtree(scratch, ignore_errors=True)
        return dataset


# ---- tokenised data sets ----


def write_cached_dataset(
    directory: Path, template: Template, parts: Mapping[str, EncodedDataset | PackedDataset]
) -> None:
    """Write tokenised, perhaps packed data: `cached_dataset.json`, one folder per part. The directory exists."""
    facts: dict[str, Any] = {"format": 1, "encoding": fingerprint(template), "packing_length": None}
    for name, part in parts.items():
        source = part.dataset if isinstance(part, PackedDataset) else part
        source.save(directory / name)
        facts[name] = {"samples": len(source), "tokens": sum(source.lengths)}
        if isinstance(part, PackedDataset):
            facts["packing_length"] = part.capacity
            facts[name] |= {"sequences": len(part), "fill_rate": round(part.fill_rate, 6)}
            flat, ends = array("q"), array("q")
            for sequence in part.sequences:
                flat.extend(sequence)
                ends.append(len(flat))
            (directory / name / f"{_SEQUENCES}.bin").write_bytes(ends.tobytes() + flat.tobytes())
    write_json(directory / FACTS_FILE, facts)


def load_cached_dataset(
    path: str, template: Template, packing_length: int | None
) -> dict[str, EncodedDataset | PackedDataset]:
    """Map a tokenised data set: {"train": ..., "val"?: ...}.

    Args: packing_length: tokens of a packed sequence, None without packing.
    Raises: DatasetError naming the first setting that differs from this run's.
    """
    directory = Path(path).expanduser()
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DatasetError(
            f"--cached_dataset {path}: has no {FACTS_FILE}; write it with `swiftlite export --to_cached_dataset true`"
        ) from None
    wanted = fingerprint(template)
    for name, value in facts["encoding"].items():
        if name != "version" and wanted.get(name) != value:
            raise DatasetError(
                f"--cached_dataset {path}: was written with {name} {_short(value)}, this run has "
                f"{_short(wanted.get(name))}; use the same setting or write it again"
            )
    if facts["packing_length"] not in (None, packing_length):
        raise DatasetError(
            f"--cached_dataset {path}: is packed to {facts['packing_length']} tokens, this run "
            + (f"packs to {packing_length}" if packing_length else "does not pack")
            + f"; use --packing true --packing_length {facts['packing_length']}"
        )
    parts: dict[str, EncodedDataset | PackedDataset] = {}
    for name in ("train", "val"):
        if name not in facts:
            continue
        dataset = EncodedDataset.load(directory / name)
        parts[name] = dataset
        if facts["packing_length"] is not None:
            sequences = _read_sequences(directory / name / f"{_SEQUENCES}.bin", facts[name]["sequences"])
            parts[name] = PackedDataset(dataset, facts["packing_length"], sequences=sequences, name=f"{path}/{name}")
        elif packing_length is not None:
            parts[name] = PackedDataset(dataset, packing_length, name=f"{path}/{name}")
    return parts


def _read_sequences(path: Path, count: int) -> list[list[int]]:
    numbers = array("q")
    try:
        numbers.frombytes(path.read_bytes())
        if len(numbers) != count + (numbers[count - 1] if count else 0):
            raise ValueError("wrong size")
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{path}: is no whole list of packed sequences ({error}); write it again") from None
    flat = numbers[count:]
    starts = [0, *numbers[: count - 1]] if count else []
    return [flat[start:end].tolist() for start, end in zip(starts, numbers[:count], strict=True)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
