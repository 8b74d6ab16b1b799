"""What a layout reads and writes. A layout is a function from a Conversation to pieces of text.

A layout reproduces its model's published Jinja, quirks included: what the Jinja ignores is ignored, what it refuses
raises TemplateError. Texts of messages are never interpreted beyond what the Jinja itself does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from swiftlite.families.records import TemplateMeta
from swiftlite.utils.errors import TemplateError

Message = dict[str, Any]
# Text, and the index of the assistant message whose answer it is (None: written by the template, never trained).
Piece = tuple[str, int | None]
Layout = Callable[["Conversation"], Iterator[Piece]]


@dataclass(frozen=True)
class Conversation:
    """One conversation to be written.

    messages: role, content and, for assistants, tool_calls and reasoning_content.
    default_system: the template's own text for where no system message comes first, or None. (One that the user
        chose arrives as a system message.)
    tokens: the tokenizer's special tokens by attribute name; absent ones are missing.
    options: what apply_chat_template takes as keyword arguments (enable_thinking, date_string, ...).
    """

    meta: TemplateMeta
    messages: list[Message]
    tools: list[Any] | None = None
    add_generation_prompt: bool = False
    default_system: str | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def bos(self) -> str:
        return self.tokens.get("bos_token", "")

    @property
    def eos(self) -> str:
        return self.tokens.get("eos_token", "")

    @property
    def starts_with_system(self) -> bool:
        return self.role(0) == "system"

    @property
    def thinking_off(self) -> bool:
        return self.options.get("enable_thinking") is False

    def role(self, index: int) -> str | None:
        """The role of a message, None outside the conversation."""
        return role_of(self.messages[index]) if 0 <= index < len(self.messages) else None

    def first(self) -> Message:
        """The first message; Jinja templates that look at `messages[0]` cannot write an empty conversation."""
        if not self.messages:
            raise TemplateError(
                f"template {self.meta.template_type!r} cannot write an empty conversation: add a message"
            )
        return self.messages[0]

    def text(self, index: int) -> str:
        """The content of a message that must be text."""
        content = self.messages[index].get("content")
        if not isinstance(content, str):
            raise TemplateError(
                f"message {index} ({role_of(self.messages[index])}) has content {_short(content)}; template "
                f"{self.meta.template_type!r} takes text only: give the message a string"
            )
        return content


def role_of(message: Message) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise TemplateError(f"a message has role {_short(role)}; use 'system', 'user', 'assistant' or 'tool'")
    return role


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as chat templates print it: non-ASCII kept, default separators."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def function_of(call: Any) -> dict[str, Any]:
    """The function of a tool call, with or without the OpenAI envelope."""
    function = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        raise TemplateError(
            f"tool call {_short(call)} has no function name; use {{'function': {{'name', 'arguments'}}}}"
        )
    return function


def shown(message: Message) -> str:
    """Content as Jinja prints a bare expression: anything through str(), a missing one as nothing."""
    return str(message.get("content", ""))


def trimmed(value: Any) -> str:
    """Jinja's `trim` filter."""
    return str(value).strip()


def split_thinking(content: str) -> tuple[str, str]:
    """Cut `<think>...</think>` off an answer. Returns (thoughts, rest); without the closing tag all is rest."""
    if "</think>" not in content:
        return "", content
    thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thoughts, content.split("</think>")[-1].lstrip("\n")


def answer(text: str, index: int, opening: str = "") -> Iterator[Piece]:
    """An assistant's text. `opening` is what the generation prompt already holds: where the text starts with it, that
    part is the prompt's, not the model's, and is not trained."""
    if opening and text.startswith(opening):
        yield opening, None
        text = text[len(opening) :]
    yield text, index
