"""Chooses between the model types that share one architecture, from what a directory holds besides its weights.

The clues, strongest first; each one may only narrow the candidates, and says why:
  1. the special tokens of a candidate's template exist in the checkpoint;
  2. the directory's name, or the name it was saved under, resembles the candidate's published ids;
  3. config values that a candidate's released checkpoints have (ModelMeta.clues).
Nothing hangs on it where the checkpoint has a chat template, which is then what writes the text.
No clue knows a model type by name; what is particular to one is data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from swiftlite.checkpoint.hub import model_name
from swiftlite.checkpoint.info import first_of, rope_scaling
from swiftlite.families.records import ModelMeta, TemplateMeta
from swiftlite.utils.io import blame, read_json
from swiftlite.utils.text import some
from swiftlite.utils.types import Config, Json

_SPECIAL = re.compile(r"<[|｜][^<>|｜]*[|｜]>")
# Parts of names that say nothing about the series: sizes, versions, kinds of tuning, formats.
_GENERIC = re.compile(
    r"v?\d+(\.\d+)*|\d+(\.\d+)?[bmk](it)?|[ae]\d+(\.\d+)?b|base|instruct|chat|it|sft|dpo|lora|rl|hf|ms|tiny|mini|small|"
    r"large|test|model|models|checkpoint|output|final|merged|ft|fp8|int4|int8|awq|gptq|bf16|preview|"
    r"mcore|megatron|my|new|the|of|finetuned|finetune",
)

Templates = Mapping[str, TemplateMeta]
Clue = tuple[list[ModelMeta], str]  # the candidates that a clue speaks for (none: it says nothing), and why


@dataclass
class Facts:
    """What one directory offers as evidence. Files are read only when a clue asks for them."""

    model_dir: str
    config: Config
    given_name: str = ""  # the id or path as the user wrote it

    @property
    def names(self) -> list[str]:
        stated = [self.given_name, self.model_dir, self.config.get("_name_or_path"), self.config.get("name_or_path")]
        return list(dict.fromkeys(model_name(n) for n in stated if n))

    @cached_property
    def tokenizer_config(self) -> Json:
        return read_json(Path(self.model_dir) / "tokenizer_config.json", optional=True)

    @cached_property
    def jinja(self) -> str | None:
        """The checkpoint's chat template: chat_template.jinja, or the one in tokenizer_config.json."""
        path = Path(self.model_dir) / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="replace")
        template = self.tokenizer_config.get("chat_template")
        with blame(Path(self.model_dir) / "tokenizer_config.json"):
            if isinstance(template, list):  # several named ones
                template = next((t.get("template") for t in template if t.get("name") == "default"), None)
            if template is not None and not isinstance(template, str):
                raise TypeError(f"chat_template is a {type(template).__name__}")
        return template

    @cached_property
    def special_tokens(self) -> set[str]:
        """Added tokens, and those that the chat template writes."""
        with blame(Path(self.model_dir) / "tokenizer_config.json"):
            decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
            found = {str(entry.get("content")) for entry in decoder.values()}
        path = Path(self.model_dir) / "tokenizer.json"
        if not found and path.is_file():
            with blame(path):
                found = {str(token["content"]) for token in read_json(path).get("added_tokens") or ()}
        return found | set(_SPECIAL.findall(self.jinja or ""))


@dataclass
class Choice:
    """What is left of the candidates, and the reasons in order."""

    candidates: list[ModelMeta]
    reasons: list[str] = field(default_factory=list)

    @property
    def templates(self) -> set[str | None]:
        return {meta.template for meta in self.candidates}


def _by_special_tokens(facts: Facts, candidates: list[ModelMeta], templates: Templates) -> Clue:
    have = facts.special_tokens
    if not have:
        return [], ""

    def marks(meta: ModelMeta) -> set[str]:
        template = templates.get(meta.template or "")
        parts = (*template.prefix, *template.prompt, *(template.system_prefix or ())) if template else ()
        return {mark for part in parts if isinstance(part, str) for mark in _SPECIAL.findall(part)}

    kept = [meta for meta in candidates if marks(meta) <= have]
    # A checkpoint with turn markers of its own was not made for a template that has none.
    marked = [meta for meta in kept if marks(meta)]
    return marked or kept, "the special tokens of the other templates are not in its vocabulary"


def _tokens(name: str) -> list[str]:
    return [t for t in re.split(r"[-_ /:+]+", name.lower()) if t]


def _overlap(name: Sequence[str], published: Sequence[str]) -> tuple[int, float]:
    """Length of the longest common run of words that holds a series name, and its share of the published name."""
    longest = 0
    for i in range(len(name)):
        for j in range(len(published)):
            n = 0
            while i + n < len(name) and j + n < len(published) and name[i + n] == published[j + n]:
                n += 1
            if n > longest and not all(_GENERIC.fullmatch(word) for word in published[j : j + n]):
                longest = n
    return longest, longest / len(published)


def _by_name(facts: Facts, candidates: list[ModelMeta], templates: Templates) -> Clue:
    names = [_tokens(name) for name in facts.names]

    def score(meta: ModelMeta) -> tuple[int, float]:
        ids = {i for release in meta.releases for i in release.ids}
        overlaps = [_overlap(name, _tokens(model_name(i))) for name in names for i in ids]
        return max(overlaps, default=(0, 0.0))

    top = max(map(score, candidates))
    kept = [meta for meta in candidates if top[0] and score(meta) == top]
    return kept, f"its name ({', '.join(facts.names)}) resembles their published names"


def _by_config(facts: Facts, candidates: list[ModelMeta], templates: Templates) -> Clue:
    scaling = rope_scaling(facts.config) or {}
    values = {"rope_type": scaling.get("rope_type", scaling.get("type"))}

    def fits(meta: ModelMeta) -> bool:
        clues = meta.clues or {}
        return bool(clues) and all(
            (values[key] if key in values else first_of(facts.config, key)) in allowed for key, allowed in clues.items()
        )

    kept = [meta for meta in candidates if fits(meta)]
    vocab = first_of(facts.config, "vocab_size")
    return kept, f"config.json (vocabulary {vocab}, rope scaling {values['rope_type']}) is theirs"


def likely(facts: Facts, candidates: list[ModelMeta]) -> list[ModelMeta]:
    """Without the types that only a name or config.json could say, where these do not."""
    if not any(meta.named for meta in candidates):
        return candidates
    said = [*_by_name(facts, candidates, {})[0], *_by_config(facts, candidates, {})[0]]
    return [meta for meta in candidates if not meta.named or meta in said]


_CLUES = (_by_special_tokens, _by_name, _by_config)


def choose(facts: Facts, candidates: Sequence[ModelMeta], templates: Mapping[str, TemplateMeta]) -> Choice:
    """Narrow `candidates` by the clues above until one is left, or no clue says more."""
    choice = Choice(list(candidates))
    for clue in _CLUES:
        if len(choice.candidates) == 1:
            break
        kept, reason = clue(facts, choice.candidates, templates)
        if kept and len(kept) < len(choice.candidates):
            choice.candidates = kept
            choice.reasons.append(f"{reason} ({some(meta.model_type for meta in kept)})")
    return choice
