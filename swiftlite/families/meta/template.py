"""Chat template records. A part is text with `{{SYSTEM}}`, `{{QUERY}}`, `{{DATE}}` holes, or `["bos_token_id"]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Part = Any  # str, or a list holding the name of a tokenizer attribute

# What a template has always been described by; `layout` and `variants` say how swiftlite renders it.
DESCRIPTIVE_FIELDS = (
    "template_type",
    "prefix",
    "prompt",
    "chat_sep",
    "suffix",
    "template_cls",
    "system_prefix",
    "default_system",
    "response_prefix",
    "auto_add_bos",
    "stop_words",
    "agent_template",
)


@dataclass(frozen=True)
class TemplateMeta:
    """Text around a conversation: prefix, then per round prompt + response, chat_sep between, suffix at the end.

    layout: which text layout of llm/template/layouts writes a conversation. "rounds" joins the parts above; every
        template whose model publishes a Jinja has the layout that reproduces that Jinja.
    variants: template types of sibling checkpoints of the same model types; where a tokenizer carries a Jinja, the
        first of (this, *variants) that renders like it is used.
    """

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
    layout: str = "rounds"
    variants: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The descriptive fields as plain values (lists, not tuples), for logs, args.json and comparison."""
        values = ((name, getattr(self, name)) for name in DESCRIPTIVE_FIELDS)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}
