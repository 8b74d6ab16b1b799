"""Tools for templates whose models have no format of their own for them: calls and results written as plain text.

`--agent_template hermes` turns a conversation with tools into one without, which every template can write. Templates
whose own chat template prints tools keep to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from swiftlite.llm.template.messages import Message, Tools, function_of, role_of, to_json

AGENT_FORMATS = ("hermes",)

# Around the list of tools in the hermes format.
HERMES_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
HERMES_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def as_plain(messages: Sequence[Message], tools: Tools | None) -> tuple[list[Message], list[int]]:
    """The conversation without tools, calls and tool messages, in the hermes format.

    The list of tools follows the system message; results in a row make one user message.
    Returns: messages, and for each the index of the one it comes from (-1: none).
    """
    plain: list[Message] = []
    origin: list[int] = []
    for i, message in enumerate(messages):
        role = role_of(message)
        if role == "tool":
            text = f"<tool_response>\n{_shown(message)}\n</tool_response>"
            if i and role_of(messages[i - 1]) == "tool":
                plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{text}"}
                continue
            message = {"role": "user", "content": text}
        elif role == "assistant" and message.get("tool_calls"):
            parts = [str(message.get("content") or ""), *map(_call, message["tool_calls"])]
            message = {k: v for k, v in message.items() if k != "tool_calls"}
            message["content"] = "\n".join(part for part in parts if part)
        plain.append(message)
        origin.append(i)
    if tools:
        listed = HERMES_HEAD + "".join("\n" + to_json(tool) for tool in tools) + HERMES_TAIL
        if plain and role_of(plain[0]) == "system":
            plain[0] = {**plain[0], "content": f"{_shown(plain[0])}\n\n{listed}"}
        else:
            plain.insert(0, {"role": "system", "content": listed})
            origin.insert(0, -1)
    return plain, origin


def _shown(message: Message) -> str:
    return str(message.get("content", ""))


def _call(call: object) -> str:
    function = function_of(call)
    arguments = function.get("arguments")
    shown = arguments if isinstance(arguments, str) else to_json(arguments)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {shown}}}\n</tool_call>'
