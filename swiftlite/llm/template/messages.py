"""What chat templates are given: messages, and their fields as templates read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeAlias

from swiftlite.utils.errors import TemplateError
from swiftlite.utils.text import short
from swiftlite.utils.types import Json

Message: TypeAlias = Json
Tools: TypeAlias = list[Json]  # schemas of the functions on offer


def role_of(message: Message) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise TemplateError(f"a message has role {short(repr(role))}; use 'system', 'user', 'assistant' or 'tool'")
    return role


def is_plain(message: Message) -> bool:
    """Whether every version of transformers gives it to a template as it is."""
    return type(message) is dict and all(
        type(value) is str and name not in _THOUGHTS for name, value in message.items()
    )


_THOUGHTS = {"reasoning_content", "reasoning", "thinking"}  # transformers 5 copies each to the other names


def function_of(call: object) -> Json:
    """The function of a tool call, with or without the OpenAI envelope."""
    function = call.get("function") or call if isinstance(call, dict) else call
    if not isinstance(function, dict) or "name" not in function:
        raise TemplateError(
            f"tool call {short(repr(call))} has no function name; use {{'function': {{'name', 'arguments'}}}}"
        )
    return function


def with_arguments(messages: Sequence[Message], kind: type) -> list[Message]:
    """Messages whose tool calls have their arguments as objects (kind dict) or as JSON text (kind str).

    Datasets hold either. A template that prints an object's JSON would print a string quoted, as no model writes it.
    """
    return [
        {**message, "tool_calls": [_with_arguments(call, kind) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), (list, tuple))
        else message
        for message in messages
    ]


def _with_arguments(call: Json, kind: type) -> Json:
    function = function_of(call)
    arguments = function.get("arguments")
    if kind is dict and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return call
    elif kind is str and isinstance(arguments, dict):
        arguments = to_json(arguments)
    else:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if call.get("function") else function


def to_json(value: object) -> str:
    """JSON as chat templates print it: non-ASCII kept, default separators."""
    return json.dumps(value, ensure_ascii=False)


def split_thinking(content: str) -> tuple[str, str]:
    """Cut `<think>...</think>` off an answer. Returns (thoughts, rest); without the closing tag all is rest."""
    if "</think>" not in content:
        return "", content
    thoughts = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thoughts, content.split("</think>")[-1].lstrip("\n")
