"""Any row -> {"messages": [...], ...}. Formats are recognised by their columns; rows that fit none raise RowError.

A standard row holds `messages` (role in system, user, assistant, tool; content text; `tool_calls` with argument
objects; `reasoning_content`), and where given `tools`, `rejected_messages`, `label`, `images`... are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]


class RowError(ValueError):
    """Why a row cannot be used. `reason` groups rows, the message adds what was seen. row: its text, if it has no value."""

    def __init__(self, reason: str, seen: str = "", row: Any = None) -> None:
        super().__init__(f"{reason}: {seen}" if seen else reason)
        self.reason = reason
        self.seen = seen
        self.row = row


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_call": "tool_call",
    "function_call": "tool_call",
}
_QUERY = ("query", "prompt", "question", "problem", "instruction", "input")
_RESPONSE = ("response", "answer", "output", "completion", "solution", "chosen")
_SYSTEM = ("system", "system_prompt")
_REJECTED = ("rejected_response", "rejected")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# What a message may carry besides role and content.
_MESSAGE_EXTRAS = ("loss", "loss_scale", "name", "tool_call_id")


def preprocess(row: Any, columns: Mapping[str, str] | None = None) -> Row:
    """Bring a row into the standard form.

    Args: columns: old column name -> new one, applied first.
    Returns: a new dict; the row is not changed.
    Raises: RowError with the reason.
    """
    if not isinstance(row, Mapping):
        raise RowError("not an object", type(row).__name__)
    # Null columns come from tables that hold several formats; they say nothing.
    named = {(columns or {}).get(key, key): value for key, value in row.items() if value is not None}
    out: Row = {"messages": _find_messages(named)}
    rejected = _find_rejected(named, out["messages"])
    if rejected is not None:
        out["rejected_messages"] = rejected
    if named.get("tools"):
        out["tools"] = _tools(named["tools"])
    elif named.get("functions"):
        out["tools"] = _tools(named["functions"])
    if "label" in named:
        out["label"] = named["label"]
    return out


def _find_messages(row: Row) -> list[Message]:
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            return _conversation(row[key], _text(row, _SYSTEM))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and (isinstance(completion, list) or isinstance(row.get("chosen"), list)):
        return _conversation([*prompt, *(completion or row["chosen"])], None)
    if isinstance(row.get("chosen"), list):
        return _conversation(row["chosen"], _text(row, _SYSTEM))
    query, response = _text(row, _QUERY), _text(row, _RESPONSE)
    if query is not None and response is not None:
        if "instruction" in row and isinstance(row.get("input"), str) and row["input"]:
            query = f"{query}\n{row['input']}" if query else row["input"]
        turns = [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
        return _conversation([*_history(row.get("history")), *turns], _text(row, _SYSTEM))
    if isinstance(row.get("text"), str):
        # Plain text for pre-training: all of it is the model's.
        return _conversation([{"role": "assistant", "content": row["text"]}], None)
    columns = ", ".join(sorted(map(str, row))) or "none"
    raise RowError("no known format", f"columns {columns}; use messages, conversations, query/response or --columns")


def _find_rejected(row: Row, messages: list[Message]) -> list[Message] | None:
    if "rejected_messages" in row:
        return _conversation(row["rejected_messages"], None)
    rejected = next((row[key] for key in _REJECTED if key in row), None)
    if rejected is None:
        return None
    if isinstance(rejected, str):
        return [*messages[:-1], {"role": "assistant", "content": rejected}]
    if isinstance(rejected, list):
        prompt = row["prompt"] if isinstance(row.get("prompt"), list) else []
        return _conversation([*prompt, *rejected], _text(row, _SYSTEM))
    raise RowError("rejected answer is not text", type(rejected).__name__)


def _text(row: Row, names: tuple[str, ...]) -> str | None:
    value = next((row[name] for name in names if name in row), None)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowError("column is not text", f"{next(n for n in names if n in row)} is {type(value).__name__}")


def _history(history: Any) -> list[Message]:
    """[[question, answer], ...] as messages."""
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("history is not a list of [question, answer] pairs")
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _conversation(messages: Any, system: str | None) -> list[Message]:
    if isinstance(messages, str):
        messages = _from_json(messages, "messages is text but no JSON")
    if not isinstance(messages, (list, tuple)):
        raise RowError("messages is not a list", type(messages).__name__)
    if not messages:
        raise RowError("messages is empty")
    out: list[Message] = []
    for message in messages:
        for standard in _messages_of(message):
            _append(out, standard)
    if system and out[0]["role"] != "system":
        out.insert(0, {"role": "system", "content": system})
    answers = [message for message in out if message["role"] == "assistant"]
    if not answers:
        raise RowError("no assistant message", f"roles {', '.join(message['role'] for message in out)}")
    if out[-1]["role"] == "assistant" and not (out[-1]["content"].strip() or out[-1].get("tool_calls")):
        raise RowError("the last answer is empty")
    return out


def _messages_of(message: Any) -> list[Message]:
    """One message of any dialect as standard ones (a pair {"human", "assistant"} gives two)."""
    if not isinstance(message, Mapping):
        raise RowError("a message is not an object", type(message).__name__)
    role = message.get("role", message.get("from"))
    if role is None and "human" in message and "assistant" in message:
        pair = (("user", message["human"]), ("assistant", message["assistant"]))
        return [{"role": name, "content": _content(text)} for name, text in pair]
    if role is None:
        raise RowError("a message has no role", f"keys {', '.join(map(str, message))}")
    standard = _ROLES.get(role) if isinstance(role, str) else None
    if standard is None:
        raise RowError("unknown role", f"{role!r}; use system, user, assistant or tool")
    content = message["content"] if "content" in message else message.get("value")
    if standard == "tool_call":
        # A call written as its own message: {"name": ..., "arguments": ...}.
        call = _from_json(content, "a tool call is no JSON") if isinstance(content, str) else content
        calls = call if isinstance(call, list) else [call]
        return [{"role": "assistant", "content": "", "tool_calls": [_call(call) for call in calls]}]
    out: Message = {"role": standard}
    called: Any = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    if called and standard == "assistant":
        if not isinstance(called, (list, tuple)):
            raise RowError("tool_calls is not a list", type(called).__name__)
        out["tool_calls"] = [_call(call) for call in called]
    out["content"] = "" if content is None and called else _content(content)
    if standard == "assistant":
        reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
        if reasoning:
            out["reasoning_content"] = reasoning
    out.update({key: message[key] for key in _MESSAGE_EXTRAS if message.get(key) is not None})
    return [out]


def _append(out: list[Message], message: Message) -> None:
    """Add a message; calls that follow an assistant's text, or each other, belong to one turn."""
    last = out[-1] if out else None
    is_bare_call = message["role"] == "assistant" and "tool_calls" in message and not message["content"]
    if last is not None and last["role"] == "assistant" and is_bare_call:
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    else:
        out.append(message)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [
            item.get("text") if isinstance(item, Mapping) and item.get("type") == "text" else item for item in content
        ]
        words = [text for text in texts if isinstance(text, str)]
        if len(words) == len(texts):
            return "".join(words)
    raise RowError("content is not text", "null" if content is None else type(content).__name__)


def _call(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments an object: chat templates print a JSON string quoted once more."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments, "tool call arguments are no JSON")
    if not isinstance(arguments, Mapping):
        raise RowError("tool call arguments are not an object", type(arguments).__name__)
    out: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    return {"id": call["id"], **out} if call.get("id") else out


def _tools(tools: Any) -> list[Any]:
    """Tool schemas: a list or its JSON; bare function schemas get OpenAI's envelope."""
    if isinstance(tools, str):
        tools = _from_json(tools, "tools is text but no JSON")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, (list, tuple)):
        raise RowError("tools is not a list", type(tools).__name__)
    out = []
    for tool in tools:
        if isinstance(tool, str):
            tool = _from_json(tool, "a tool is text but no JSON")
        if not isinstance(tool, Mapping):
            raise RowError("a tool is not an object", type(tool).__name__)
        is_bare = "name" in tool and "function" not in tool
        out.append({"type": "function", "function": dict(tool)} if is_bare else dict(tool))
    return out


def _from_json(text: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(reason, str(error)) from None
