"""Chat template records. A part is text with `{{SYSTEM}}`, `{{QUERY}}`, `{{DATE}}` holes, or `["bos_token_id"]` for a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Part = Any  # str, or a list holding the name of a tokenizer attribute


@dataclass(frozen=True)
class TemplateMeta:
    """Text around a conversation: prefix, then per round prompt + response, chat_sep between, suffix at the end."""

    template_type: str
    prefix: tuple[Part, ...]
    prompt: tuple[Part, ...]
    chat_sep: tuple[Part, ...] | None
    suffix: tuple[Part, ...] = (["eos_token_id"],)
    template_cls: str = "Template"
    system_prefix: tuple[Part, ...] | None = None
    default_system: str | None = None
    response_prefix: str = ""
    auto_add_bos: bool = False
    stop_words: tuple[Part, ...] = ()
    agent_template: str = "react_en"
