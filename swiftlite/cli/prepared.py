"""What a directory given to `deploy` or `eval` stands for, as engines read it: a Hugging Face model or a PEFT adapter.

A run's directory stands for one of its checkpoints. What is in Megatron's format is converted, and an adapter that is to be
merged is merged, by `export`, into the cache: SWIFTLITE_CACHE/models/NAME-IDENTITY. The identity is of the files that are
read (names, sizes, heads, times of change) and of what is done with them, so nothing there is stale or written twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from swiftlite import __version__
from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.adapter import is_other_kind
from swiftlite.checkpoint.files import side_files
from swiftlite.checkpoint.hub import local_directory
from swiftlite.checkpoint.info import ARGS_FILE
from swiftlite.cli.export import export_main
from swiftlite.llm.dataset.cache import cache_root
from swiftlite.train.intervals import BEST_FILE
from swiftlite.utils.directories import ADAPTER_CONFIG, CARRIED, Directory, expect
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import read_json
from swiftlite.utils.logger import get_logger
from swiftlite.weights.journal import fingerprint

logger = get_logger()


@dataclass(frozen=True)
class Readable:
    """model: a directory or a hub's id, None where an adapter was given alone. adapter: a PEFT directory, or None."""

    model: str | None
    adapter: Path | None = None


def readable(given: str, which: str = "newest", words: Sequence[str] = ()) -> Readable:
    """What a word given as a model or an adapter stands for; converted where no engine reads its format.

    Args: which: "newest" or "best" checkpoint of a run. words: further flags of `export`, such as --model for a Megatron
        checkpoint without a config.json of its own.
    Raises: UsageError, CheckpointError saying what a directory is that is none of these.
    """
    path = Path(given).expanduser()
    if local_directory(given) is None:
        return Readable(given)
    path = checkpoint_of(path, which)
    found = Directory(path)
    if found.is_peft:
        return Readable(None, path)
    if found.is_megatron_adapter:
        return Readable(None, exported(path, ["--mcore_adapter", str(path), "--to_hf", "true", *words]))
    if found.is_megatron and not found.is_hf:
        return Readable(str(exported(path, ["--mcore_model", str(path), "--to_hf", "true", *words])))
    return Readable(str(expect("model", path, "is_hf")))


def checkpoint_of(path: Path, which: str) -> Path:
    """The checkpoint that a run's directory stands for; another directory is itself.

    Raises: UsageError where the best one is asked for and no evaluation has chosen one.
    """
    found = Directory(path)
    if found.is_hf or found.is_peft or found.has(".metadata"):
        return path
    newest = found.iteration or (found.newest.path if found.newest else None)
    if newest is None:
        return path
    if which == "best":
        root = newest.parent
        name = str(read_json(root / BEST_FILE, optional=True).get("checkpoint"))
        if not (root / name).is_dir():
            raise UsageError(
                f"{path}: no evaluation of this run has chosen a best checkpoint; leave out --checkpoint best"
            )
        newest = root / name
    written = newest.with_name(f"{newest.name}-hf")
    newest = written if written.is_dir() else newest
    logger.info("%s stands for its %s checkpoint, %s", path, which, newest.name)
    return newest


def merged(adapter: Path, model: str, words: Sequence[str] = ()) -> Path:
    """The directory of a model with an adapter in its weights."""
    base = [path for path in Path(model).iterdir() if path.is_file()] if Path(model).is_dir() else []
    return exported(adapter, ["--model", model, "--adapters", str(adapter), "--merge_lora", "true", *words], base)


def exported(source: Path, words: Sequence[str], beside: Iterable[Path] = ()) -> Path:
    """What `export` makes of a directory, from the cache where it was made before. beside: further files that it reads."""
    files = {*beside, *(path for path in source.iterdir() if path.is_file())}
    if Directory(source).has(".metadata"):  # config and tokenizer of an iteration lie next to it
        root = source.parent
        files.update(side_files(root), (root / CARRIED).glob("*"))
        files.update(path for name in (ARGS_FILE, ADAPTER_CONFIG) if (path := root / name).is_file())
    identity = hashlib.sha256(fingerprint(files, [__version__, *words]).encode()).hexdigest()[:16]
    target = cache_root() / "models" / f"{name_of(source)}-{identity}"
    if target.is_dir():
        logger.info("%s: its Hugging Face form is in the cache, %s", source, target)
    else:
        export_main(parse(ExportArguments, [*words, "--output_dir", str(target)]))
    return target


def name_of(path: str | Path) -> str:
    """What a model is called by its directory: the run's name too where the directory is a numbered checkpoint."""
    path = Path(path).absolute()
    numbered = path.name.startswith(("checkpoint-", "iter_"))
    return f"{path.parent.name}-{path.name}" if numbered and path.parent.name else path.name


def loads_beside(adapter: Path) -> bool:
    """Whether vLLM and SGLang compute an adapter beside its model: matrices of one rank and scale, and nothing else."""
    stated = read_json(adapter / ADAPTER_CONFIG)
    more = ("modules_to_save", "trainable_token_indices", "rank_pattern", "alpha_pattern", "layer_replication")
    return not is_other_kind(adapter) and stated.get("bias", "none") == "none" and not any(map(stated.get, more))
