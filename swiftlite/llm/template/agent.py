"""Tools for templates whose models have no format of their own for them: calls and results written as plain text.

`--agent_template hermes` turns a conversation with tools into one without, which every template can write. Templates
whose own chat template prints tools keep to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swiftlite.llm.template.layouts.chatml import HERMES_HEAD, HERMES_TAIL, hermes_call
from swiftlite.llm.template.layouts.conversation import Message, role_of, shown, to_json

AGENT_FORMATS = ("hermes",)


def as_plain(messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[Message], list[int]]:
    """The conversation without tools, calls and tool messages, in the hermes format.

    The list of tools follows the system message; results in a row make one user message.
    Returns: messages, and for each the index of the one it comes from (-1: none).
    """
    plain: list[Message] = []
    origin: list[int] = []
    for i, message in enumerate(messages):
        role = role_of(message)
        if role == "tool":
            text = f"<tool_response>\n{shown(message)}\n</tool_response>"
            if i and role_of(messages[i - 1]) == "tool":
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{text}"}
                continue
            message = {"role": "user", "content": text}
        elif role == "assistant" and message.get("tool_calls"):
            parts = [str(message.get("content") or ""), *map(hermes_call, message["tool_calls"])]
            message = {k: v for k, v in message.items() if k != "tool_calls"}
            message["content"] = "\n".join(part for part in parts if part)
        plain.append(message)
        origin.append(i)
    if tools:
        listed = HERMES_HEAD + "".join("\n" + to_json(tool) for tool in tools) + HERMES_TAIL
        if plain and role_of(plain[0]) == "system":
            plain[0] = {**plain[0], "content": f"{shown(plain[0])}\n\n{listed}"}
        else:
            plain.insert(0, {"role": "system", "content": listed})
            origin.insert(0, -1)
    return plain, origin
