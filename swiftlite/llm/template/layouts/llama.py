"""Llama 2, Llama 3, and Llama 3.1 with its later siblings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swiftlite.llm.template.layouts.conversation import Conversation, Piece, answer, role_of, to_json, trimmed
from swiftlite.utils.errors import TemplateError

# Llama 3.2's own Jinja prints the running day instead; a fixed date keeps a resumed run's tokens the same.
DEFAULT_DATE = "26 Jul 2024"

_FUNCTION_CALL_RULES = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def llama(c: Conversation) -> Iterator[Piece]:
    """Llama 2: strictly alternating turns, the system text inside the first user turn."""
    c.first()
    start = 1 if c.starts_with_system else 0
    for i in range(start, len(c.messages)):
        role = role_of(c.messages[i])
        if (role == "user") != ((i - start) % 2 == 0):
            raise TemplateError(
                f"message {i} ({role}) is out of turn: template {c.meta.template_type!r} needs user and assistant in "
                "turn, user first; merge or remove messages"
            )
        if role not in ("user", "assistant"):
            continue
        content = c.text(i)
        if i == start == 1:
            content = f"<<SYS>>\n{c.text(0)}\n<</SYS>>\n\n{content}"
        if role == "user":
            yield f"{c.bos}[INST] {content.strip()} [/INST]", None
        else:
            yield f" {content.strip()} ", i
            yield c.eos, None


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def llama3(c: Conversation) -> Iterator[Piece]:
    """Every role alike, content trimmed."""
    for i, message in enumerate(c.messages):
        role = role_of(message)
        yield ("" if i else c.bos) + _header(role), None
        yield trimmed(message.get("content", "")), i if role == "assistant" else None
        yield "<|eot_id|>", None
    if c.add_generation_prompt:
        yield _header("assistant"), None


def llama3_1(c: Conversation) -> Iterator[Piece]:
    """Dates in a system turn always; tools in the first user turn (tools_in_user_message=False: in the system turn)."""
    builtin_tools = c.options.get("builtin_tools")
    tools = c.options.get("custom_tools", c.tools)
    in_user_message = tools is not None and c.options.get("tools_in_user_message", True)
    c.first()
    start = 1 if c.starts_with_system else 0
    system = trimmed(c.messages[0].get("content", "")) if start else ""

    text = c.bos + _header("system")
    if builtin_tools is not None or tools is not None:
        text += "Environment: ipython\n"
    if builtin_tools is not None:
        text += "Tools: " + ", ".join(tool for tool in builtin_tools if tool != "code_interpreter") + "\n\n"
    text += f"Cutting Knowledge Date: December 2023\nToday Date: {c.options.get('date_string', DEFAULT_DATE)}\n\n"
    listed = "".join(to_json(tool, indent=4) + "\n\n" for tool in tools or ())
    if tools is not None and not in_user_message:
        text += "You have access to the following functions. To call a function, please respond with JSON for a "
        text += f"function call.{_FUNCTION_CALL_RULES}{listed}"
    yield f"{text}{system}<|eot_id|>", None

    if in_user_message:
        if start == len(c.messages):
            raise TemplateError("tools are printed in the first user message, and there is none: add a user message")
        yield _header("user"), None
        yield "Given the following functions, please respond with a JSON for a function call ", None
        yield f"with its proper arguments that best answers the given prompt.\n\n{_FUNCTION_CALL_RULES}{listed}", None
        yield trimmed(c.messages[start].get("content", "")) + "<|eot_id|>", None
        start += 1

    for i in range(start, len(c.messages)):
        message, role = c.messages[i], role_of(c.messages[i])
        if message.get("tool_calls") is not None:
            yield _header("assistant"), None
            yield from answer(_call(message["tool_calls"], builtin_tools), i)
            # eom: the model waits for the tool's result inside its own turn.
            yield "<|eot_id|>" if builtin_tools is None else "<|eom_id|>", None
        elif role in ("tool", "ipython"):
            content = message.get("content")
            shown = to_json(content) if isinstance(content, (str, dict, list)) else str(content)
            yield f"{_header('ipython')}{shown}<|eot_id|>", None
        else:
            yield _header(role), None
            yield trimmed(message.get("content", "")), i if role == "assistant" else None
            yield "<|eot_id|>", None
    if c.add_generation_prompt:
        yield _header("assistant"), None


def _call(calls: list[Any], builtin_tools: list[str] | None) -> str:
    if len(calls) != 1:
        raise TemplateError(f"{len(calls)} tool calls in one turn; Llama 3.1 supports a single one: split the turn")
    function = calls[0].get("function") if isinstance(calls[0], dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise TemplateError("a tool call has no function name; use {'function': {'name', 'arguments'}}")
    name, arguments = function["name"], function.get("arguments")
    if builtin_tools is not None and name in builtin_tools:
        if not isinstance(arguments, dict):
            raise TemplateError(
                f"the call of built-in tool {name!r} has no argument object; give arguments as an object"
            )
        return f"<|python_tag|>{name}.call(" + ", ".join(f'{key}="{value}"' for key, value in arguments.items()) + ")"
    return f'{{"name": "{name}", "parameters": {to_json(arguments)}}}'
