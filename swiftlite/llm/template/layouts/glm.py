"""GLM-4.5: no end token of its own; the header of the next turn ends an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from swiftlite.llm.template.layouts.conversation import (
    Conversation,
    Piece,
    answer,
    function_of,
    role_of,
    split_thinking,
    to_json,
)
from swiftlite.utils.errors import TemplateError

_EMPTY_THINK = "\n<think></think>"
_TOOLS_HEAD = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_TOOLS_TAIL = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)


def glm4_5(c: Conversation) -> Iterator[Piece]:
    # Unlike Qwen3, any false value of enable_thinking counts, None too where it is given.
    thinking_off = "enable_thinking" in c.options and not c.options["enable_thinking"]
    opening = _EMPTY_THINK if thinking_off else ""
    yield "[gMASK]<sop>", None
    if c.tools:
        yield _TOOLS_HEAD + "".join(to_json(tool) + "\n" for tool in c.tools) + _TOOLS_TAIL, None
    last_user = max((i for i, message in enumerate(c.messages) if role_of(message) == "user"), default=-1)
    for i, message in enumerate(c.messages):
        role = role_of(message)
        if role == "user":
            content = _visible(message)
            nothink = "/nothink" if thinking_off and not content.endswith("/nothink") else ""
            yield f"<|user|>\n{content}{nothink}", None
        elif role == "assistant":
            yield "<|assistant|>", None
            yield from answer(_assistant(message, keeps_thoughts=i > last_user), i, opening)
        elif role == "tool":
            yield _tool(message, opens=c.role(i - 1) != "tool"), None
        elif role == "system":
            yield f"<|system|>\n{_visible(message)}", None
    if c.add_generation_prompt:
        yield f"<|assistant|>{opening}", None


def _visible(message: dict[str, Any]) -> str:
    """Text of a content that is a string or a list of strings and `{"type": "text", "text": ...}` items."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = (
            item.get("text", "") if isinstance(item, dict) and item.get("type") == "text" else item for item in content
        )
        return "".join(text for text in texts if isinstance(text, str))
    return str(content)


def _assistant(message: dict[str, Any], keeps_thoughts: bool) -> str:
    content = _visible(message)
    thoughts = message.get("reasoning_content")
    if not isinstance(thoughts, str):
        thoughts, content = split_thinking(content)
    text = f"\n<think>{thoughts.strip()}</think>" if keeps_thoughts and thoughts else _EMPTY_THINK
    if content.strip():
        text += "\n" + content.strip()
    for call in message.get("tool_calls") or ():
        function = function_of(call)
        text += f"\n<tool_call>{function['name']}\n"
        for key, value in _arguments(function).items():
            shown = value if isinstance(value, str) else to_json(value)
            text += f"<arg_key>{key}</arg_key>\n<arg_value>{shown}</arg_value>\n"
        text += "</tool_call>"
    return text


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object; the Jinja cannot print a JSON string, which data sets often hold."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass
    if not isinstance(arguments, dict):
        raise TemplateError(f"arguments of tool call {function['name']!r} are no JSON object; give an object")
    return arguments


def _tool(message: dict[str, Any], opens: bool) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return ("<|observation|>" if opens else "") + f"\n<tool_response>\n{content}\n</tool_response>"
    if not isinstance(content, (list, tuple)):
        raise TemplateError(f"a tool message has content {content!r}; give text or a list of results")
    outputs = (item["output"] if isinstance(item, dict) and "output" in item else item for item in content)
    return "<|observation|>" + "".join(f"\n<tool_response>\n{output}\n</tool_response>" for output in outputs)
