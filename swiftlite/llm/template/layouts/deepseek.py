"""DeepSeek's first chat format, DeepSeek-R1, and two formats of the same simple kind: ERNIE 4.5 and NuminaMath."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from swiftlite.llm.template.layouts.conversation import (
    Conversation,
    Piece,
    answer,
    function_of,
    role_of,
    to_json,
)

_THINK = "<think>\n"


def deepseek(c: Conversation) -> Iterator[Piece]:
    yield c.bos, None
    for i, message in enumerate(c.messages):
        role = role_of(message)
        if role == "user":
            yield f"User: {c.text(i)}\n\n", None
        elif role == "assistant":
            yield "Assistant:", None
            yield f" {c.text(i)}", i
            yield c.eos, None
        elif role == "system":
            yield f"{c.text(i)}\n\n", None
    if c.add_generation_prompt:
        yield "Assistant:", None


def ernie(c: Conversation) -> Iterator[Piece]:
    yield c.tokens.get("cls_token", "<|begin_of_sentence|>"), None
    for i, message in enumerate(c.messages):
        role = role_of(message)
        if role == "user":
            yield f"User: {c.text(i)}\n", None
        elif role == "assistant":
            yield "Assistant: ", None
            yield c.text(i), i
            yield c.tokens.get("sep_token", "<|end_of_sentence|>"), None
        elif role == "system":
            yield f"{c.text(i)}\n", None
    if c.add_generation_prompt:
        yield "Assistant: ", None


def numina(c: Conversation) -> Iterator[Piece]:
    """System messages are left out; the generation prompt follows a user message only."""
    for i, message in enumerate(c.messages):
        role = role_of(message)
        if role == "user":
            yield f"### Problem: {c.text(i)}\n", None
        elif role == "assistant":
            yield "### Solution: ", None
            yield f"{c.text(i)}\n", i
    if c.add_generation_prompt and c.role(len(c.messages) - 1) == "user":
        yield "### Solution: ", None


def deepseek_r1(c: Conversation) -> Iterator[Piece]:
    """Thoughts are cut from every turn; tools are not listed, calls and results are printed.

    As in the Jinja, only the first call of a conversation opens a calls block and only the first result an outputs
    block, and what ends a block comes with the answer that follows.
    """
    yield c.bos, None
    yield "\n\n".join(c.text(i) for i, message in enumerate(c.messages) if role_of(message) == "system"), None
    after_tool = calls_seen = outputs_seen = False
    for i, message in enumerate(c.messages):
        role, calls = role_of(message), message.get("tool_calls")
        if role == "user":
            after_tool = False
            yield f"<｜User｜>{c.text(i)}", None
        elif role == "assistant" and calls is not None:
            after_tool = False
            yield from _calls_turn(c, i, calls, opens=not calls_seen)
            calls_seen = calls_seen or bool(calls)
        elif role == "assistant":
            content = c.text(i)
            yield "<｜tool▁outputs▁end｜>" if after_tool else "<｜Assistant｜>", None
            if not after_tool and "</think>" in content:
                content = content.split("</think>")[-1]
            after_tool = False
            yield from answer(content, i, opening=_THINK)
            yield "<｜end▁of▁sentence｜>", None
        elif role == "tool":
            after_tool = True
            opens = "" if outputs_seen else "<｜tool▁outputs▁begin｜>"
            outputs_seen = True
            yield f"{opens}<｜tool▁output▁begin｜>{c.text(i)}<｜tool▁output▁end｜>", None
    if after_tool:
        yield "<｜tool▁outputs▁end｜>", None
    elif c.add_generation_prompt:
        yield f"<｜Assistant｜>{_THINK}", None


def _calls_turn(c: Conversation, index: int, calls: list[Any], opens: bool) -> Iterator[Piece]:
    text = ""
    for n, call in enumerate(calls):
        function = function_of(call)
        arguments = function.get("arguments")
        shown = arguments if isinstance(arguments, str) else to_json(arguments)
        if opens and n == 0:
            yield "<｜Assistant｜>", None
            text += "" if c.messages[index].get("content") is None else c.text(index)
            text += "<｜tool▁calls▁begin｜>"
        else:
            text += "\n"
        kind = call.get("type", "function")
        text += f"<｜tool▁call▁begin｜>{kind}<｜tool▁sep｜>{function['name']}\n```json\n{shown}\n```<｜tool▁call▁end｜>"
    yield from answer(f"{text}<｜tool▁calls▁end｜>", index, opening=_THINK)
    yield "<｜end▁of▁sentence｜>", None
