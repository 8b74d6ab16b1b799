"""The layout of templates whose models publish no Jinja: the parts of TemplateMeta joined round by round."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime

from swiftlite.families.records import Part
from swiftlite.llm.template.layouts.conversation import Conversation, Piece, role_of
from swiftlite.utils.errors import TemplateError

_HOLE = re.compile(r"\{\{([A-Z]+)\}\}")


def rounds(c: Conversation) -> Iterator[Piece]:
    """prefix, then per round prompt + answer, chat_sep between rounds, suffix after the last answer.

    The prompt part holds the assistant's header, so a conversation that ends with a user message always ends with
    it. Two messages in a row of one role are joined.
    """
    messages = c.messages
    system = c.default_system
    start = 0
    if c.starts_with_system:
        system, start = c.text(0), 1
    if system and c.meta.system_prefix is None:
        raise TemplateError(f"template {c.meta.template_type!r} takes no system message: remove it")
    date = c.options.get("date_string") or datetime.now().strftime("%d %b %Y")
    prefix = c.meta.system_prefix if system and c.meta.system_prefix is not None else c.meta.prefix
    yield join_parts(prefix, c.tokens, SYSTEM=system or "", DATE=date), None

    query = ""
    for i in range(start, len(messages)):
        role = role_of(messages[i])
        if role not in ("user", "assistant") or messages[i].get("tool_calls"):
            what = "tool calls" if role == "assistant" else f"role {role!r}"
            raise TemplateError(
                f"message {i} has {what}; template {c.meta.template_type!r} knows one system message, then user and "
                "assistant: leave such rows out or choose another --template, or --agent_template hermes"
            )
        joins_next = c.role(i + 1) == role
        if role == "user":
            query += c.text(i)
            if not joins_next:
                yield join_parts(c.meta.prompt, c.tokens, QUERY=query), None
                query = ""
        else:
            yield c.text(i), i
            if not joins_next:
                is_last = i == len(messages) - 1
                yield join_parts(c.meta.suffix if is_last else c.meta.chat_sep or (), c.tokens), None


def join_parts(parts: Sequence[Part], tokens: dict[str, str], **holes: str) -> str:
    """Text of a template part. Holes are filled in one pass, so that a text with `{{QUERY}}` in it stays as it is."""
    out = ""
    for part in parts:
        if isinstance(part, str):
            out += _HOLE.sub(lambda hole: holes.get(hole[1], hole[0]), part)
        else:
            out += "".join(tokens.get(name.removesuffix("_id"), "") for name in part)
    return out
