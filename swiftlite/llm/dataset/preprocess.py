"""Any row -> {"messages": [...], ...}. Formats are recognised by their columns; rows that fit none raise RowError.

A standard row holds `messages` (role in system, user, assistant, tool; content text; `tool_calls` with argument
objects; `reasoning_content`), and where given `tools`, `rejected_messages`, `label`, `margin`, `channel`. Other columns are
left out, but rows with images, video or sound are refused: a text model would learn to answer without them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from swiftlite.llm.template.messages import Tools
from swiftlite.utils.text import short
from swiftlite.utils.types import Json

Row = Json
Message = Json


class RowError(ValueError):
    """Why a row cannot be used. `reason` groups rows, the message adds what was seen. row: its text, if it has no value."""

    def __init__(self, reason: str, seen: str = "", row: object = None) -> None:
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
_SEES_NOTHING = "has images, video or sound, which are not trained on"
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# What a message may carry besides role and content: texts and numbers.
_MESSAGE_EXTRAS = ("name", "tool_call_id")
_WEIGHTS = ("loss", "loss_scale", "weight")
# No schema or call of a real dataset is as deep; printing one that is deeper ends in a RecursionError.
_MAX_DEPTH = 64
_LARGEST = 1e308  # Python prints no whole number that is much longer


def preprocess(row: object, columns: Mapping[str, str] | None = None, answered: bool = True) -> Row:
    """Bring a row into the standard form.

    Args: columns: old column name -> new one, applied first. answered: False for what a model is to answer or to read:
        the answer may be missing or empty, and plain text is the user's.
    Returns: a new dict; the row is not changed.
    Raises: RowError with the reason.
    """
    if not isinstance(row, Mapping):
        raise RowError("not an object", type(row).__name__)
    # Null columns come from tables that hold several formats; they say nothing. Tables of numbers write NaN for null.
    named = {(columns or {}).get(key, key): value for key, value in row.items() if not is_missing(value)}
    media = next((key for key in _MEDIA if named.get(key)), None)
    if media:
        raise RowError(_SEES_NOTHING, f"column {media}")
    out: Row = {"messages": _find_messages(named, answered)}
    _check_answers(out["messages"], answered)
    rejected = _find_rejected(named, out["messages"])
    if rejected is not None:
        out["rejected_messages"] = rejected
    if named.get("tools"):
        out["tools"] = _tools(named["tools"])
    elif named.get("functions"):
        out["tools"] = _tools(named["functions"])
    if "label" in named:
        out["label"] = named["label"]
    if isinstance(named.get("channel"), str | int | float):
        out["channel"] = str(named["channel"])
    if "margin" in named:
        out["margin"] = _margin(named["margin"])
    return out


def _margin(value: object) -> float:
    """How much better a chosen answer is, for reward models."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("margin is not a number", short(ascii(value)))
    return float(value)


def is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _find_messages(row: Row, answered: bool) -> list[Message]:
    for key in ("messages", "conversations", "conversation"):
        if key in row:
            messages = conversation(row[key], _text(row, _SYSTEM))
            if messages[-1]["role"] != "assistant" and _chosen(row) is not None:
                messages = [*messages, *_answer_of(row, "chosen")]
            return messages
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list):
        answer = completion if isinstance(completion, list) else row.get("chosen")
        if isinstance(answer, list) or not answered:
            return conversation([*prompt, *(answer or ())], None)
    if isinstance(row.get("chosen"), list):
        return conversation(row["chosen"], _text(row, _SYSTEM))
    query, response = _text(row, _QUERY), _text(row, _RESPONSE)
    if query is not None and (response is not None or not answered):
        if "instruction" in row and isinstance(row.get("input"), str) and row["input"]:
            query = f"{query}\n{row['input']}" if query else row["input"]
        turns = [{"role": "user", "content": query}]
        turns += [] if response is None else [{"role": "assistant", "content": response}]
        return conversation([*_history(row.get("history")), *turns], _text(row, _SYSTEM))
    if isinstance(row.get("text"), str):
        # Plain text for pre-training is all the model's.
        return conversation([{"role": "assistant" if answered else "user", "content": row["text"]}], None)
    columns = ", ".join(sorted(map(str, row)))[:200] or "none"
    raise RowError("no known format", f"columns {columns}; use messages, conversations, query/response or --columns")


def _chosen(row: Row) -> object:
    """The better answer to a conversation that ends with a question, None where the row ranks nothing."""
    return row.get("chosen") if any(key in row for key in _REJECTED) else None


def _answer_of(row: Row, key: str) -> list[Message]:
    """An answer that stands in its own column: text, one message, or several."""
    value = row[key]
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{'chosen' if key == 'chosen' else 'rejected'} answer is not text", type(value).__name__)
    return conversation(value, None)


def _find_rejected(row: Row, messages: list[Message]) -> list[Message] | None:
    if "rejected_messages" in row:
        rejected = conversation(row["rejected_messages"], None)
        _check_answers(rejected)
        return rejected
    key = next((key for key in _REJECTED if key in row), None)
    if key is None:
        return None
    answer = _answer_of(row, key)
    prompt = row["prompt"] if isinstance(row.get("prompt"), list) else []
    if isinstance(row[key], list) and (prompt or answer[0]["role"] != "assistant"):  # a whole conversation
        rejected = conversation([*prompt, *row[key]], _text(row, _SYSTEM))
        _check_answers(rejected)
        return rejected
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return [*messages[:end], *answer]


def _text(row: Row, names: tuple[str, ...]) -> str | None:
    value = next((row[name] for name in names if name in row), None)
    if value is None or isinstance(value, str):
        return value
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    except ValueError:  # a whole number of more digits than Python prints
        pass
    raise RowError("column is not text", f"{next(n for n in names if n in row)} is {type(value).__name__}")


def _history(history: object) -> list[Message]:
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


def conversation(messages: object, system: str | None) -> list[Message]:
    if isinstance(messages, str):
        messages = _from_json(messages, "messages is text but not JSON")
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
    return out


def _check_answers(messages: list[Message], answered: bool = True) -> None:
    """A conversation that is trained on has answers, and the last one says something."""
    if not answered:
        return
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no assistant message", f"roles {', '.join(message['role'] for message in messages[:20])}")
    last = messages[-1]
    if last["role"] == "assistant" and not (last["content"].strip() or last.get("tool_calls")):
        raise RowError("the last answer is empty")


def _messages_of(message: object) -> list[Message]:
    """One message of any dialect as standard ones (a pair {"human", "assistant"} gives two)."""
    if not isinstance(message, Mapping):
        raise RowError("a message is not an object", type(message).__name__)
    role = message.get("role", message.get("from"))
    if role is None and "human" in message and "assistant" in message:
        pair = (("user", message["human"]), ("assistant", message["assistant"]))
        return [{"role": name, "content": _content(text)} for name, text in pair]
    if role is None:
        raise RowError("a message has no role", f"keys {short(ascii(list(message)))}")
    standard = _ROLES.get(role) if isinstance(role, str) else None
    if standard is None:
        raise RowError("unknown role", f"{short(ascii(role))}; use system, user, assistant or tool")
    content = message["content"] if "content" in message else message.get("value")
    if standard == "tool_call":
        # A call written as its own message: {"name": ..., "arguments": ...}.
        call = _from_json(content, "a tool call is not JSON") if isinstance(content, str) else content
        calls = call if isinstance(call, list) and call else [call]
        return [{"role": "assistant", "content": "", "tool_calls": [_call(call) for call in calls]}]
    out: Message = {"role": standard}
    called = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    if called and standard == "assistant":
        if not isinstance(called, (list, tuple)):
            raise RowError("tool_calls is not a list", type(called).__name__)
        out["tool_calls"] = [_call(call) for call in called]
    out["content"] = "" if content is None and called else _content(content)
    if standard == "assistant":
        reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
        if reasoning:
            out["reasoning_content"] = reasoning
    out.update(_weight(message))
    for key in _MESSAGE_EXTRAS:
        if not is_missing(message.get(key)):
            out[key] = _plain(message[key], key)
    return [out]


def _weight(message: Mapping[str, object]) -> Message:
    """How much a message counts: `loss` (true, false or a number), `loss_scale`, or OpenAI's `weight`."""
    found: Message = {}
    for key in _WEIGHTS:
        value = message.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value < math.inf:
            raise RowError(f"{key} is not a number", f"{short(ascii(value))}; use true, false or a number, 0 or more")
        found[key] = value
    weight = found.pop("weight", 1)
    # 1 is what a message weighs anyway, where the strategy of --loss_scale says nothing else.
    return found if weight == 1 or "loss" in found or "loss_scale" in found else {**found, "loss_scale": weight}


def _append(out: list[Message], message: Message) -> None:
    """Add a message; calls that follow an assistant's text, or each other, belong to one turn."""
    last = out[-1] if out else None
    is_bare_call = message["role"] == "assistant" and "tool_calls" in message and not message["content"]
    if last is not None and last["role"] == "assistant" and is_bare_call:
        last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
    else:
        out.append(message)


def _content(content: object) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        texts = [
            item.get("text") if isinstance(item, Mapping) and item.get("type") == "text" else item for item in content
        ]
        words = [text for text in texts if isinstance(text, str)]
        if len(words) == len(texts):
            return "".join(words)
        kinds = (str(item.get("type")) for item in content if isinstance(item, Mapping))
        media = next((kind for kind in kinds if kind.startswith(("image", "video", "audio", "input_"))), None)
        if media:
            raise RowError(_SEES_NOTHING, f"a message's part of type {media}")
    raise RowError("content is not text", "null" if content is None else type(content).__name__)


def _call(call: object) -> Json:
    """A tool call in OpenAI's form, its arguments an object: chat templates print a JSON string quoted once more."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError("a tool call has no function name")
    arguments = function.get("arguments", function.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments, "tool call arguments are not JSON")
    if not isinstance(arguments, Mapping):
        raise RowError("tool call arguments are not an object", type(arguments).__name__)
    plain = _plain(arguments, "tool call")
    out: Json = {"type": "function", "function": {"name": function["name"], "arguments": plain}}
    identity = call.get("id") if isinstance(call, Mapping) else None
    return {"id": _plain(identity, "tool call"), **out} if identity else out


def _tools(tools: object) -> Tools:
    """Tool schemas: a list or its JSON; bare function schemas get OpenAI's envelope."""
    if isinstance(tools, str):
        tools = _from_json(tools, "tools is text but not JSON")
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, (list, tuple)):
        raise RowError("tools is not a list", type(tools).__name__)
    out = []
    for tool in tools:
        if isinstance(tool, str):
            tool = _from_json(tool, "a tool is text but not JSON")
        if not isinstance(tool, Mapping):
            raise RowError("a tool is not an object", type(tool).__name__)
        plain = _plain(tool, "tool")
        is_bare = "name" in plain and "function" not in plain
        out.append({"type": "function", "function": plain} if is_bare else plain)
    return out


def _plain(value: object, what: str, depth: int = 0) -> Any:
    """A copy that any chat template can print: texts, finite numbers, true, false, null, lists, objects.

    Raises: RowError naming what is none of these.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        if not -_LARGEST < value < _LARGEST:
            raise RowError(f"{what} holds a number that JSON cannot", type(value).__name__)
        return value
    if depth > _MAX_DEPTH:
        raise RowError("nested too deeply", f"{what} has more than {_MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RowError(f"{what} has a key that is not text")
        return {key: _plain(inner, what, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, what, depth + 1) for inner in value]
    raise RowError(f"{what} holds a value that JSON cannot", type(value).__name__)


def _from_json(text: str, reason: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(reason, str(error)) from None
    except RecursionError:
        raise RowError("nested too deeply") from None


def plain_label(value: object) -> object:
    """A label as JSON has it: text that is JSON is what it says, as cells of CSV need it; true and false are 1 and 0."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    return int(value) if isinstance(value, bool) else value
