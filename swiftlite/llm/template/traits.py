"""What small trials show of a chat template: how its answers end and begin, how it wants arguments of tool calls."""

from __future__ import annotations

from dataclasses import dataclass

from swiftlite.llm.template.jinja import ChatTemplate
from swiftlite.llm.template.messages import Message, Tools, to_json
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.types import Json

_ASKED: Message = {"role": "user", "content": "a"}
_ROUNDS: list[Message] = [_ASKED, {"role": "assistant", "content": "b"}] * 2
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
_ARGUMENTS = {"x": "y"}


def _calling(arguments: Json | str) -> list[Message]:
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "name": "f", "tool_call_id": "call00001", "content": "r"}
    return [_ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, result, _ROUNDS[1]]


@dataclass(frozen=True)
class Traits:
    """What trials show of a chat template; empty texts where there is nothing such.

    end, call_end: the token that ends an answer, and one that calls a tool. opening: the beginning of thoughts that the
    generation prompt holds. arguments: as what it wants the arguments of tool calls, dict or str; None: either.
    """

    end: str
    call_end: str
    opening: str
    arguments: type | None


def traits_of(chat: ChatTemplate, options: Json) -> Traits:
    """Try a chat template out with small conversations. options: what each text of it is written with."""

    def end(messages: list[Message], tools: Tools | None) -> str:
        try:
            text, spans = chat.write_answers(messages, tools, options)
        except TemplateError:
            return ""
        first, last, _ = spans[0]
        tagged = chat.is_tagged(tools)
        inside = (e for e in chat.ends if tagged and text[first:last].rstrip().endswith(e))
        return next(inside, "") or chat.end_at(text, last)

    def write(messages: list[Message], tools: Tools | None, generation: bool = False) -> str | None:
        try:
            return chat.write(messages, tools, generation, options)
        except TemplateError:
            return None

    prompt, without = write([_ASKED], None, True) or "", write([_ASKED], None) or ""
    opening = prompt[prompt.rfind("<think>") :] if "<think>" in prompt.removeprefix(without) else ""
    by_dict, by_str = write(_calling(_ARGUMENTS), [_TOOL]), write(_calling(to_json(_ARGUMENTS)), [_TOOL])
    arguments = None if by_dict == by_str else str if by_dict is None else dict
    calling = _calling(to_json(_ARGUMENTS) if arguments is str else _ARGUMENTS)
    return Traits(end(_ROUNDS, None), end(calling, [_TOOL]), "" if "</think>" in opening else opening, arguments)
