"""The chat template and the end token that a directory names for servers, and carrying them to another directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swiftlite.checkpoint.files import copy_sentence_files, end_tokens, update_config
from swiftlite.utils.io import read_json, write_json

JINJA, GENERATION = "chat_template.jinja", "generation_config.json"


class Beside(Protocol):
    """What is written next to weights or adapters. base: the directory of the model that they come from, if another."""

    def write(self, directory: Path, base: Path | None = None) -> None: ...


@dataclass(frozen=True)
class Chat:
    """jinja: the registered template that was trained, None where it was the model's own, which its files hold. end: id of
    the token that was trained to end an answer, None if that is not a special token."""

    jinja: str | None
    end: int | None

    def write(self, directory: Path, base: Path | None = None) -> None:
        """Put both into a directory. base: where the generation config of the model lies, if not there."""
        if self.jinja is not None:
            config = directory / "tokenizer_config.json"
            if _template_in(config) is not None and not (directory / JINJA).is_file():
                update_config(config, {"chat_template": self.jinja})  # where this model has it
            else:
                (directory / JINJA).write_text(self.jinja, encoding="utf-8")
                if config.is_file():  # or readers would find the other one there
                    update_config(config, {"chat_template": None})
        if self.end is None:
            return
        places = [folder / name for name in (GENERATION, "config.json") for folder in (directory, base or directory)]
        source = next((path for path in places if path.is_file()), None)
        stored = read_json(source) if source is not None else {}
        if source is not None and source.name != GENERATION:
            stored = {key: stored[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if stored.get(key)}
        ids = end_tokens(stored.get("eos_token_id"))
        if self.end not in ids:
            write_json(directory / GENERATION, {**stored, "eos_token_id": [self.end, *ids] if ids else self.end})


def copy_chat(source: Path, target: Path) -> None:
    """Let what an adapter became in `target`, merged or in another format, have the chat of its directory `source`, or what
    sentence-transformers reads there."""
    copy_sentence_files(source, target)
    file, config = source / JINJA, source / "tokenizer_config.json"
    jinja = file.read_text(encoding="utf-8") if file.is_file() else _template_in(config)
    ids = end_tokens(read_json(source / GENERATION, optional=True).get("eos_token_id"))
    Chat(jinja, ids[0] if ids else None).write(target)


def _template_in(config: Path) -> str | None:
    """The one chat template in a tokenizer_config.json, if there is one."""
    found = read_json(config, optional=True).get("chat_template")
    return found if isinstance(found, str) else None
