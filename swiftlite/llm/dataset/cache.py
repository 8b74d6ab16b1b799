"""Tokenised data on disk: a cache by content between runs, and datasets that `export --to_cached_dataset` writes."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from swiftlite import __version__
from swiftlite.arguments.task import TaskArguments
from swiftlite.llm.dataset.classes import Labels
from swiftlite.llm.dataset.encoded import EncodedDataset, place_of
from swiftlite.llm.dataset.packing import PackedDataset, pack_windows
from swiftlite.llm.dataset.pairs import PairDataset
from swiftlite.llm.dataset.report import DropReport, RejectsFile
from swiftlite.llm.dataset.store import JoinedStore, TokenStore, hash_of_file
from swiftlite.llm.template.base import Template
from swiftlite.utils.errors import DatasetError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import short
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from swiftlite.llm.dataset.answers import AnswerDataset

FACTS_FILE = "cached_dataset.json"
_DROPPED_FILE = "dropped.json"
_SEQUENCES = "sequences"
# Settings of a template that change what a row is encoded as.
_SETTINGS = (
    "default_system", "max_length", "truncation_strategy", "use_chat_template", "loss_scale", "template_backend",
    "enable_thinking", "add_non_thinking_prefix", "agent_template", "suffix", "stop_words", "remove_unused_columns",
    "pooled",
)  # fmt: skip
# Grows when rows are read, written or stored differently.
_FORMAT = 3
# What a cached dataset of another release may differ in: it was written on purpose.
_OF_RELEASE = ("version", "code")


def fingerprint(template: Template) -> Json:
    """What decides how rows are encoded, as plain values; equal ones give equal tokens and labels."""
    facts: Json = {"template": template.template_type, "tokenizer": _tokenizer_hash(template.tokenizer)}
    facts.update({name: getattr(template, name, None) for name in _SETTINGS})
    facts["weights"] = [dict(scale) for scale in template.weights]
    facts["special_tokens"] = dict(template.special_tokens)
    if template.use_chat_template:
        source = template.chat.registered or json.dumps(template.tokenizer.chat_template)
        facts["chat_template"] = hash_of([source])
        if "strftime_now" in source:
            facts["date"] = str(date.today())
    facts["format"] = _FORMAT
    facts["version"] = f"{__version__}, tokenizers {version('tokenizers')}"
    facts["code"] = hash_of(map(_source, type(template).__mro__[:-1]))
    return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def difference(encoding: Json, wanted: Json) -> str | None:
    """How the fingerprint of written data differs from that of a run, None where the rows are encoded alike."""
    for name in (*wanted, *(name for name in encoding if name not in wanted)):
        if name not in _OF_RELEASE and wanted.get(name) != encoding.get(name):
            then, now = (short(json.dumps(facts.get(name), ensure_ascii=False)) for facts in (encoding, wanted))
            return f"was written with {name} {then}, this run has {now}"
    return None


def _source(thing: type | Callable[..., object]) -> str:
    """Python text of a class or function, which plug-ins may bring; its name where there is none."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', thing)}"


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    added = {str(i): repr(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    parts = [type(tokenizer).__name__, json.dumps(added, sort_keys=True)]
    if getattr(tokenizer, "is_fast", False):
        # Padding and truncation are settings of the last call.
        value = json.loads(tokenizer.backend_tokenizer.to_str())
        value.pop("padding", None), value.pop("truncation", None)
        return hash_of([*parts, json.dumps(value, sort_keys=True)])
    # Scores and merges are in its files only, and it may bring code.
    files = [getattr(tokenizer, f"{name}_file", None) for name in ("vocab", "merges")]
    contents = [hash_of_file(Path(file)) for file in files if file and Path(file).is_file()]
    vocab = json.dumps({str(token): i for token, i in tokenizer.get_vocab().items()}, sort_keys=True)
    return hash_of([*parts, *contents, vocab, _source(type(tokenizer))])


def hash_of(texts: Iterable[str]) -> str:
    """xxh3_128 of texts in their order."""
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
    rows: list[Json],
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

    def encode() -> EncodedDataset:
        return EncodedDataset(
            rows, template, max_drop_ratio=max_drop_ratio, name=name, num_proc=num_proc, rejects=rejects
        )

    key = hash_of([json.dumps(fingerprint(template)), *(json.dumps(row, default=str) for row in rows)])
    directory = cache_root() / "datasets" / key
    with ExitStack() as stack:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(directory.with_name(f".{key}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # the system gives it back when the process ends, however that happens
        except OSError as error:
            get_logger().warning(
                "%s: cannot be used as a cache (%s); the data is tokenised anew", directory.parent, error
            )
            return encode()
        if directory.exists():
            try:
                dataset = _from_cache(directory, rows, rejects)
            except DatasetError as error:
                get_logger().warning("%s; the cache is damaged, so the data is tokenised anew", error)
                shutil.rmtree(directory, ignore_errors=True)
            else:
                get_logger().info("%s: %d samples from the cache %s", name, len(dataset), directory)
                dataset.report.check(max_drop_ratio, name)
                return dataset
        dataset = encode()
        scratch = directory.with_name(f".{key}.{os.getpid()}")
        try:
            _write_cache(dataset, len(rows), scratch)
            scratch.rename(directory)
        except OSError as error:  # a full disk; or another process was first, where locks do not work
            get_logger().warning("%s: the cache cannot be written (%s)", directory, error)
            shutil.rmtree(scratch, ignore_errors=True)
        return dataset


def _write_cache(dataset: EncodedDataset, num_rows: int, directory: Path) -> None:
    dataset.store.save(directory)
    kept = set(dataset.row_indices)
    gone = [i for i in range(num_rows) if i not in kept]
    log = [(reason, detail) for reason, _, detail in dataset.report.log or []]
    facts = {
        "total": dataset.report.total,
        "row_indices": dataset.row_indices,
        "rows": [[*entry, index] for entry, index in zip(log, gone, strict=True)],
    }
    write_json(directory / _DROPPED_FILE, {**facts, "hash": hash_of([json.dumps(facts)])})


def _from_cache(directory: Path, rows: list[Json], rejects: RejectsFile | None) -> EncodedDataset:
    """Raises: DatasetError for one that is not as it was written."""
    dataset = EncodedDataset.of(TokenStore.load(directory))
    path = directory / _DROPPED_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.pop("hash") != hash_of([json.dumps(facts)]):
            raise ValueError("its content has changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    dataset.report = DropReport(total=facts["total"], rejects=rejects)
    for reason, detail, index in facts["rows"]:
        dataset.report.drop(reason, place_of(rows[index], index), detail, rows[index])
    dataset.row_indices = facts["row_indices"]
    return dataset


# ---- tokenised datasets ----


Part: TypeAlias = "EncodedDataset | PackedDataset | PairDataset | AnswerDataset"
# What a dataset holds that is no samples of sft: what it is called, how it is written, who trains on it.
_KINDS = {
    "pairs": ("preference pairs", "--template_mode rlhf", "swiftlite dpo"),
    "answers": ("labelled answers", "--template_mode kto", "swiftlite rlhf --rlhf_type kto"),
}


def write_cached_dataset(
    directory: Path,
    template: Template,
    parts: Mapping[str, Part],
    task: TaskArguments | None = None,
) -> None:
    """Write tokenised, perhaps packed data: `cached_dataset.json`, one folder per part. The directory exists.

    task: says how the samples' labels were read.
    """
    facts: Json = {"format": 1, "encoding": fingerprint(template), "packing_length": None}
    labels = Labels.of(task) if task is not None else None
    if labels is not None:
        facts["labels"] = asdict(labels)
    for name, part in parts.items():
        source = part.dataset if isinstance(part, PackedDataset) else part
        source.store.save(directory / name)
        facts[name] = {"samples": len(source), "tokens": sum(source.lengths)}
        if isinstance(part, PairDataset):
            facts["pairs"] = True
        elif not isinstance(part, EncodedDataset | PackedDataset):
            facts["answers"] = True
        elif isinstance(part, PackedDataset):
            facts["packing_length"] = part.capacity
            facts[name] |= {"sequences": len(part), "fill_rate": round(part.fill_rate, 6)}
            flat, ends = array("q"), array("q")
            for sequence in part.sequences:
                flat.extend(sequence)
                ends.append(len(flat))
            (directory / name / f"{_SEQUENCES}.bin").write_bytes(ends.tobytes() + flat.tobytes())
    write_json(directory / FACTS_FILE, facts)


def labels_written(path: str) -> Labels | None:
    """How the labels of a tokenised dataset were read; None where it has none, or is none."""
    facts = read_json(directory_of(path)[0] / FACTS_FILE, optional=True)
    return _labels(facts)


def _labels(facts: Json) -> Labels | None:
    try:
        return Labels(str(facts["labels"]["problem_type"]), int(facts["labels"]["num_labels"]))
    except (KeyError, TypeError, ValueError):
        return None


def load_cached_dataset(
    paths: Sequence[str],
    template: Template,
    packing_length: int | None,
    parts: Sequence[str] = ("train",),
    task: TaskArguments | None = None,
) -> EncodedDataset | PackedDataset | None:
    """Parts (the first of `parts` that is there) of tokenised datasets, end to end, mapped; None if none has any.

    Args: paths: directories; DIR/train and DIR/val are parts of DIR. packing_length: tokens of a packed sequence, None
        without packing. task: says how this run reads labels.
    Raises: DatasetError naming the first setting that differs from this run's.
    """
    labels = Labels.of(task) if task is not None else None
    stores: list[TokenStore] = []
    sequences: list[list[int]] = []
    for path in paths:
        directory, name, facts = _part(path, parts, template)
        if _labels(facts) != labels:
            raise DatasetError(
                f"--cached_dataset {path}: was written {_said(_labels(facts))}, this run is {_said(labels)}; use the same "
                "setting or write it again"
            )
        if facts["packing_length"] not in (None, packing_length):
            raise DatasetError(
                f"--cached_dataset {path}: is packed to {facts['packing_length']} tokens, this run "
                + (f"packs to {packing_length}" if packing_length else "does not pack")
                + f"; use --packing true --packing_length {facts['packing_length']}"
            )
        _check_kind(path, facts, None)
        if name is None:
            continue
        store = TokenStore.load(directory / name)
        if packing_length is not None:
            packed = (
                _read_sequences(directory, facts, name, len(store))
                if facts["packing_length"]
                else pack_windows(store.lengths(), packing_length, 42)
            )
            before = sum(map(len, stores))
            sequences += [[i + before for i in sequence] for sequence in packed]
        stores.append(store)
    if not stores:
        return None
    dataset = EncodedDataset.of(_joined(stores))
    if packing_length is None:
        return dataset
    return PackedDataset(dataset, packing_length, sequences=sequences, name=f"{' '.join(paths)} ({parts[0]})")


def _said(labels: Labels | None) -> str:
    return f"with --num_labels {labels.num_labels} --problem_type {labels.problem_type}" if labels else "without labels"


def load_cached_store(
    paths: Sequence[str], template: Template, kind: str, parts: Sequence[str] = ("train",)
) -> TokenStore | None:
    """As `load_cached_dataset`, of what --template_mode wrote. kind: pairs, or answers with labels."""
    stores = []
    for path in paths:
        directory, name, facts = _part(path, parts, template)
        _check_kind(path, facts, kind)
        if name is not None:
            stores.append(TokenStore.load(directory / name))
    return _joined(stores) if stores else None


def _check_kind(path: str, facts: Json, wanted: str | None) -> None:
    """Raises: DatasetError for data of another kind. wanted: None: samples."""
    found = next((kind for kind in _KINDS if facts.get(kind)), None)
    if found == wanted:
        return
    if found is not None:
        name, _, command = _KINDS[found]
        raise DatasetError(f"--cached_dataset {path}: holds {name}; train on them with `{command}`")
    assert wanted is not None
    name, mode, _ = _KINDS[wanted]
    raise DatasetError(
        f"--cached_dataset {path}: holds no {name}; write them with `swiftlite export --to_cached_dataset true {mode}`"
    )


def _joined(stores: Sequence[TokenStore]) -> TokenStore:
    return stores[0] if len(stores) == 1 else JoinedStore(stores)


def directory_of(path: str) -> tuple[Path, str | None]:
    """(directory of tokenised data, None), or (directory, part) of DIR/train and DIR/val."""
    given = Path(path).expanduser()
    inside = given.name in ("train", "val") and not (given / FACTS_FILE).is_file()
    return (given.parent, given.name) if inside else (given, None)


def _part(path: str, parts: Sequence[str], template: Template) -> tuple[Path, str | None, Json]:
    """(directory, name of the part that is meant, what cached_dataset.json says). Raises: DatasetError."""
    directory, named = directory_of(path)
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
        if not isinstance(facts.get("encoding"), dict) or not isinstance(facts["packing_length"], int | None):
            raise ValueError
    except (OSError, ValueError, KeyError, AttributeError, RecursionError):
        raise DatasetError(
            f"--cached_dataset {path}: has no {FACTS_FILE}; write it with `swiftlite export --to_cached_dataset true`"
        ) from None
    differs = difference(facts["encoding"], fingerprint(template))
    if differs is not None:
        raise DatasetError(f"--cached_dataset {path}: {differs}; use the same setting or write it again")
    if named is not None and named not in facts:
        raise DatasetError(f"{path}: {directory} has no part {named}")
    return directory, named or next((part for part in parts if part in facts), None), facts


def _read_sequences(directory: Path, facts: Json, name: str, num_samples: int) -> list[list[int]]:
    numbers = array("q")
    path = directory / name / f"{_SEQUENCES}.bin"
    try:
        count = int(facts[name]["sequences"])
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{directory / FACTS_FILE}: has no number of sequences; write it again") from None
    try:
        numbers.frombytes(path.read_bytes())
        if len(numbers) != count + (numbers[count - 1] if count else 0):
            raise ValueError("wrong size")
        ends, flat = numbers[:count], numbers[count:]
        if sorted(ends) != list(ends) or (flat and not 0 <= min(flat) <= max(flat) < num_samples):
            raise ValueError("wrong numbers")
    except (OSError, ValueError, IndexError) as error:
        raise DatasetError(f"{path}: is not a whole list of packed sequences ({error}); write it again") from None
    starts = [0, *numbers[: count - 1]] if count else []
    return [flat[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
