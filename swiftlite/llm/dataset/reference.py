"""What a reference says to a dataset, kept on disk between runs."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.dataset.cache import cache_root, hash_of
from swiftlite.llm.dataset.store import facts_of_files
from swiftlite.train.questions import Questions
from swiftlite.train.reference import model_directory
from swiftlite.utils.dist import all_gather, is_main_process
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

_WEIGHTS = (".safetensors", ".bin", ".distcp", ".metadata")
_SETTINGS = ("quant_method", "quant_bits", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "new_special_tokens")


def cached_answers(questions: Questions[object], args: SftArguments, ask: Callable[[], list[float]]) -> list[float]:
    """Log-probabilities of all questions, from the cache where this reference was asked the same before. Collective."""
    logger = get_logger()
    if not questions:
        return []
    path, known = Path(), None
    if is_main_process():
        key = hash_of([questions.content_hash(), json.dumps(_identity(args), sort_keys=True)])
        path = cache_root() / "reference" / f"{key}.bin"
        known = _read(path, len(questions))
    answers = all_gather(known)[0]
    if answers is not None:
        logger.info("what the reference says to %d sequences is in the cache", len(questions))
        return answers
    answers = ask()
    logger.info("the reference answered %d sequences", len(questions))
    if is_main_process():
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(array("d", answers).tobytes())
            beside.rename(path)
        except OSError as error:  # a full disk, for one
            logger.warning("%s: the cache cannot be written (%s)", path, error)
            with suppress(OSError):
                beside.unlink()
    return answers


def _read(path: Path, count: int) -> list[float] | None:
    numbers = array("d")
    try:
        numbers.frombytes(path.read_bytes())
    except (OSError, ValueError):
        return None
    return numbers.tolist() if len(numbers) == count else None


def facts_of_weights(directory: Path) -> Json:
    """What tells one model from another, see facts_of_files."""
    files = (f for f in directory.rglob("*") if f.suffix in _WEIGHTS or f.name.endswith("config.json"))
    return facts_of_files(sorted(files))


def _identity(args: SftArguments) -> Json:
    """What decides the answers besides the tokens: bytes of the reference's weights, and how they are computed with."""
    directories = [Path(str(getattr(args, "mcore_model", None) or args.model_info.model_dir))]
    if args.ref_model:
        directories = [model_directory(args, args.ref_model)]
    directories += [Path(args.ref_adapters)] if args.ref_adapters else []
    facts = {name: getattr(args, name, None) for name in _SETTINGS}
    return {
        **facts, "weights": [facts_of_weights(found) for found in directories], "dtype": str(args.model_info.torch_dtype),
        "side": type(args).__name__,
    }  # fmt: skip
