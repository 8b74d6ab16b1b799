"""ChatML: plain, Qwen2.5, QwQ, Qwen3 and its 2507 releases, InternLM, Yi."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from swiftlite.llm.template.layouts.conversation import (
    Conversation,
    Piece,
    answer,
    function_of,
    role_of,
    shown,
    split_thinking,
    to_json,
)

_THINK = "<think>\n"
_EMPTY_THINK = "<think>\n\n</think>\n\n"

# The hermes tool format, as Qwen2.5 and later print it.
HERMES_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
HERMES_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def chatml(c: Conversation) -> Iterator[Piece]:
    """Every role alike, content as it is; a default system message where none comes first."""
    if c.messages and c.default_system and not c.starts_with_system:
        yield f"<|im_start|>system\n{c.default_system}<|im_end|>\n", None
    for i, message in enumerate(c.messages):
        yield f"<|im_start|>{role_of(message)}\n", None
        yield c.text(i), i if message["role"] == "assistant" else None
        yield "<|im_end|>\n", None
    if c.add_generation_prompt:
        yield "<|im_start|>assistant\n", None


def internlm2(c: Conversation) -> Iterator[Piece]:
    """ChatML after the bos token. The default system message that serving code knows is not in the Jinja."""
    yield c.bos, None
    yield from chatml(replace(c, default_system=None))


def yi(c: Conversation) -> Iterator[Piece]:
    """Yi-1.5: the system text bare; the assistant's turn is opened by each user turn, asked for or not."""
    c.first()
    if c.starts_with_system:
        yield shown(c.messages[0]), None
    for i, message in enumerate(c.messages):
        if role_of(message) == "user":
            yield f"<|im_start|>user\n{c.text(i)}<|im_end|>\n<|im_start|>assistant\n", None
        elif message["role"] == "assistant":
            yield c.text(i), i
            yield "<|im_end|>\n", None


def qwen2_5(c: Conversation) -> Iterator[Piece]:
    """Hermes tools; a default system message, also in front of the tools."""
    yield from _head(c, separator_always=True)
    for i, message in enumerate(c.messages):
        role, calls = role_of(message), message.get("tool_calls") or []
        if role == "user" or (role == "system" and i) or (role == "assistant" and not calls):
            yield f"<|im_start|>{role}\n", None
            yield c.text(i), i if role == "assistant" else None
            yield "<|im_end|>\n", None
        elif role == "assistant":
            yield "<|im_start|>assistant", None
            content = "\n" + c.text(i) if message.get("content") else ""
            yield from _calls_turn(content, calls, i)
        elif role == "tool":
            yield _tool_response(c, i, shown(message)), None
    if c.add_generation_prompt:
        yield "<|im_start|>assistant\n", None


def qwq(c: Conversation) -> Iterator[Piece]:
    """As Qwen2.5 without a default system message; thoughts are cut from every turn but the last; always thinks."""
    yield from _head(c, separator_always=True)
    for i, message in enumerate(c.messages):
        role, calls = role_of(message), message.get("tool_calls") or []
        is_last = i == len(c.messages) - 1
        if role == "user" or (role == "system" and i):
            yield f"<|im_start|>{role}\n{c.text(i)}<|im_end|>\n", None
        elif role == "assistant" and not calls:
            yield "<|im_start|>assistant\n", None
            yield from answer(c.text(i) if is_last else _after_thinking(c.text(i)), i, opening=_THINK)
            yield "<|im_end|>\n", None
        elif role == "assistant":
            yield "<|im_start|>assistant", None
            content = message.get("content")
            if not is_last:
                content = _after_thinking(c.text(i))
            yield from _calls_turn(f"\n{content}" if message.get("content") else "", calls, i, opening=_THINK)
        elif role == "tool":
            yield _tool_response(c, i, shown(message)), None
    if c.add_generation_prompt:
        yield f"<|im_start|>assistant\n{_THINK}", None


def qwen3(c: Conversation) -> Iterator[Piece]:
    """Hybrid thinking: `enable_thinking=False` closes an empty thought block in the generation prompt."""
    return _qwen3(c, opening=_EMPTY_THINK if c.thinking_off else "", thinks=True)


def qwen3_thinking(c: Conversation) -> Iterator[Piece]:
    """The 2507 thinking releases: the generation prompt opens a thought block."""
    return _qwen3(c, opening=_THINK, thinks=True)


def qwen3_nothinking(c: Conversation) -> Iterator[Piece]:
    """The 2507 instruct releases: no thoughts; content is printed as it is."""
    return _qwen3(c, opening="", thinks=False)


def _qwen3(c: Conversation, opening: str, thinks: bool) -> Iterator[Piece]:
    yield from _head(c, separator_always=False)
    last_query = _last_query(c)
    for i, message in enumerate(c.messages):
        role = role_of(message)
        content = message["content"] if isinstance(message.get("content"), str) else ""
        if role == "user" or (role == "system" and i):
            yield f"<|im_start|>{role}\n{content}<|im_end|>\n", None
        elif role == "assistant":
            yield "<|im_start|>assistant\n", None
            thoughts = ""
            if thinks:
                thoughts, content = _thoughts(message, content)
            is_last = i == len(c.messages) - 1
            if thinks and i > last_query and (is_last or thoughts):
                # Only turns of the round in progress keep their thoughts.
                stripped_thoughts = thoughts.strip("\n")
                shown = f"<think>\n{stripped_thoughts}\n</think>\n\n" + content.lstrip("\n")
            else:
                shown = content
            calls = message.get("tool_calls") or []
            text = "".join(("\n" if n or content else "") + hermes_call(call) for n, call in enumerate(calls))
            yield from answer(shown + text, i, opening)
            yield "<|im_end|>\n", None
        elif role == "tool":
            yield _tool_response(c, i, content), None
    if c.add_generation_prompt:
        yield f"<|im_start|>assistant\n{opening}", None


def _last_query(c: Conversation) -> int:
    """Index of the last user message that is not a tool response in disguise."""
    for i in range(len(c.messages) - 1, -1, -1):
        content = c.messages[i].get("content")
        if role_of(c.messages[i]) == "user" and isinstance(content, str):
            if not (content.startswith("<tool_response>") and content.endswith("</tool_response>")):
                return i
    return len(c.messages) - 1


def _thoughts(message: dict[str, Any], content: str) -> tuple[str, str]:
    reasoning = message.get("reasoning_content")
    return (reasoning, content) if isinstance(reasoning, str) else split_thinking(content)


def _after_thinking(content: str) -> str:
    return content.split("</think>")[-1].lstrip("\n")


def _head(c: Conversation, separator_always: bool) -> Iterator[Piece]:
    """The system turn with the tools in it. Qwen3 leaves the blank line out where no system text precedes the tools."""
    c.first()
    has_system = c.starts_with_system
    if c.tools:
        # Qwen2.5's Jinja prints the content by itself here, so that anything passes; elsewhere it adds strings.
        before = c.default_system or ""
        if has_system:
            before = shown(c.messages[0]) if separator_always else c.text(0)
        if separator_always or has_system or before:
            before += "\n\n"
        listed = "".join("\n" + to_json(tool) for tool in c.tools)
        yield f"<|im_start|>system\n{before}{HERMES_HEAD}{listed}{HERMES_TAIL}<|im_end|>\n", None
    elif has_system or c.default_system:
        yield f"<|im_start|>system\n{c.text(0) if has_system else c.default_system}<|im_end|>\n", None


def hermes_call(call: Any) -> str:
    """A tool call as Qwen3 prints it."""
    function = function_of(call)
    arguments = function.get("arguments")
    shown = arguments if isinstance(arguments, str) else to_json(arguments)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {shown}}}\n</tool_call>'


def _calls_turn(content: str, calls: list[Any], index: int, opening: str = "") -> Iterator[Piece]:
    """A Qwen2.5 turn with tool calls; its Jinja prints arguments as JSON even where they are a string already."""
    text = content
    for call in calls:
        function = function_of(call)
        arguments = to_json(function.get("arguments"))
        text += f'\n<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    # The newline ends the header, which the Jinja prints with the text here.
    yield "\n", None
    yield from answer(text.removeprefix("\n"), index, opening)
    yield "<|im_end|>\n", None


def _tool_response(c: Conversation, index: int, content: str) -> str:
    """One tool result; results in a row share one user turn."""
    opens = "<|im_start|>user" if c.role(index - 1) != "tool" else ""
    closes = "<|im_end|>\n" if c.role(index + 1) != "tool" else ""
    return f"{opens}\n<tool_response>\n{content}\n</tool_response>{closes}"
