"""`--new_special_tokens`: which tokens, how many vocabulary rows they need, and their entry in tokenizer files.

A tokenizer that is written keeps the form of its source, in which other releases and servers can read it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import read_json, write_text_atomic
from swiftlite.utils.types import Json

# Embedding rows after a resize are a multiple of this, so that tensor parallelism can divide them.
VOCAB_MULTIPLE = 128
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "*.tiktoken",
)  # fmt: skip


def read_special_tokens(items: Sequence[str] | None) -> list[str]:
    """The tokens that `--new_special_tokens` names; an item ending in `.txt` is a file of them, split at whitespace."""
    tokens: list[str] = []
    for item in items or ():
        if not item.endswith(".txt"):
            tokens.append(item)
        elif Path(item).is_file():
            tokens += Path(item).read_text(encoding="utf-8").split()
        else:
            raise UsageError(f"--new_special_tokens {item}: no such file; give a file of tokens, or tokens")
    return list(dict.fromkeys(tokens))


def resized_vocab_size(vocab_size: int, num_tokens: int) -> int:
    """Embedding rows needed for `num_tokens`: unchanged where they fit, else the next multiple of VOCAB_MULTIPLE."""
    return vocab_size if num_tokens <= vocab_size else -(-num_tokens // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def enter_tokens(directory: Path, ids: Mapping[str, int]) -> None:
    """Enter tokens into the tokenizer files in `directory`; all else there stays as it is."""
    fast = directory / "tokenizer.json"
    if fast.is_file():
        tokenizer = read_json(fast)
        known = {entry["content"]: entry for entry in tokenizer.setdefault("added_tokens", [])}
        for token, number in ids.items():
            if token in known:
                known[token]["special"] = True
            else:
                tokenizer["added_tokens"].append({"id": number, "content": token, **_FLAGS})
        _write(fast, tokenizer)
    path = directory / "tokenizer_config.json"
    config = read_json(path, optional=True)
    decoder = config.get("added_tokens_decoder")
    if decoder is not None or not fast.is_file():
        config["added_tokens_decoder"] = {**(decoder or {}), **{
            str(number): {"content": token, **_FLAGS} for token, number in ids.items()
            if str(number) not in (decoder or {})
        }}  # fmt: skip
    _append(config, ids)
    _write(path, config)
    stated = directory / "special_tokens_map.json"
    if stated.is_file():
        named = read_json(stated)
        if _append(named, ids):
            _write(stated, named)
    slow = directory / "added_tokens.json"
    if slow.is_file():
        _write(slow, {**read_json(slow), **ids})


def copy_tokenizer(source: Path, target: Path, ids: Mapping[str, int]) -> None:
    """Copy the tokenizer of a model directory, with new tokens, next to an adapter."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
    enter_tokens(target, ids)


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _append(config: Json, tokens: Iterable[str]) -> bool:
    """Add tokens to the list of additional ones, under whichever name it has, in the form of its entries."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        if isinstance(listed, list):
            present = {entry.get("content") if isinstance(entry, dict) else entry for entry in listed}
            config[key] = [*listed, *(token for token in tokens if token not in present)]
            return True
    return False


def _write(path: Path, value: object) -> None:
    """As JSON, indented as the file was."""
    first = path.read_text(encoding="utf-8-sig")[:80].split("\n") if path.is_file() else ["{", "  "]
    indent = len(first[1]) - len(first[1].lstrip()) if len(first) > 1 else None
    write_text_atomic(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
