"""Requests of OpenAI's chat and completions API, checked before a model sees them: what is wrong is the client's to know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
_LENGTHS = ("max_completion_tokens", "max_tokens")
_MOST_STOPS = 16


class BadRequest(ValueError):
    """A request that no answer follows from. param: what of it is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def checked_request(body: bytes, chat: bool, tokenizer: PreTrainedTokenizerBase, longest: int | None) -> Json:
    """The request, with `stop` as a list and a length that fits into the model.

    Args: longest: tokens of a conversation with its answer, None: unknown.
    Raises: BadRequest saying what is wrong.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadRequest("the body is not a JSON object")
    for name, (least, most) in _NUMBERS.items():
        value = request.get(name)
        if value is not None and (not _is_number(value) or not least <= value <= most):
            raise BadRequest(f"{name} is {json.dumps(value)}; it must be a number from {least} to {most}", name)
    for name in _LENGTHS:
        value = request.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise BadRequest(f"{name} is {json.dumps(value)}; it must be a whole number from 1", name)
    _check_unsupported(request)
    request["stop"] = _stops(request.get("stop"))
    if not request["stop"]:
        del request["stop"]
    prompt = _chat_length(request, tokenizer) if chat else _text_length(request, tokenizer)
    _fit(request, prompt, longest)
    return request


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_unsupported(request: Mapping[str, object]) -> None:
    """What transformers' server would leave out without a word, so that the client gets another thing than it asked for."""
    form = request.get("response_format")
    plain = form is None or (isinstance(form, Mapping) and form.get("type") == "text")
    asked = {"n": request.get("n") not in (None, 1), "logprobs": bool(request.get("logprobs")), "response_format": not plain,
             "tool_choice": request.get("tool_choice") not in (None, "auto"),
             "presence_penalty": bool(request.get("presence_penalty"))}  # fmt: skip
    for name, is_asked in asked.items():
        if is_asked:
            raise BadRequest(f"{name}: transformers' server does not have it; serve with vllm or sglang", name)


def _stops(stop: object) -> list[str]:
    words = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise BadRequest("stop must be a text or a list of texts, none of them empty", "stop")
    if len(words) > _MOST_STOPS:
        raise BadRequest(f"stop has {len(words)} texts; at most {_MOST_STOPS}", "stop")
    return words


def _fit(request: Json, prompt: int, longest: int | None) -> None:
    """Raises: BadRequest for a conversation that leaves no room for the answer. Without a length, it is what is left."""
    asked = next((request[name] for name in _LENGTHS if request.get(name) is not None), None)
    if longest is None:
        return
    if prompt + (asked or 1) > longest:
        raise BadRequest(
            f"the prompt has {prompt} tokens and the answer {f'may have {asked}' if asked else 'needs room'}; "
            f"the model holds {longest}",
            "messages" if "messages" in request else "prompt",
        )
    if asked is None:
        request["max_tokens"] = longest - prompt


def _text_length(request: Json, tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(request.get("prompt"), str):
        raise BadRequest("prompt must be a text", "prompt")
    return len(tokenizer(request["prompt"])["input_ids"])


def _chat_length(request: Json, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the prompt. Whatever the chat template has against it is the client's mistake."""
    messages, tools = request.get("messages"), request.get("tools")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", "messages")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise BadRequest('tools must be a list like [{"type": "function", "function": {"name": ...}}]', "tools")
    options = request.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs")
    read = [_message(message, number) for number, message in enumerate(messages)]
    try:
        ids = tokenizer.apply_chat_template(read, tools=tools, add_generation_prompt=True, return_dict=False, **options)
    except Exception as error:  # a template's own refusals are jinja2's; others trip over what they did not expect
        raise BadRequest(f"the chat template cannot write this conversation: {one_line(error)}", "messages") from None
    return len(ids)


def _is_tool(tool: object) -> TypeGuard[Json]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _message(message: object, number: int) -> Json:
    """A message as the server gives it to the chat template: parts joined, arguments as objects."""
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRequest(f"{where} must be an object with a role", "messages")
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and not calls:
        raise BadRequest(f"{where} has no content", "messages")
    if isinstance(content, list):
        content = " ".join(_part(part, where) for part in content)
    elif content is not None and not isinstance(content, str):
        raise BadRequest(f"{where}: content must be a text or a list of parts", "messages")
    return {**message, "content": content or "", **({"tool_calls": _calls(calls, where)} if calls else {})}


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        raise BadRequest(f'{where}: only parts of text are read, {{"type": "text", "text": ...}}', "messages")
    return str(part["text"])


def _calls(calls: object, where: str) -> Sequence[Json]:
    found = []
    for call in calls if isinstance(calls, list) else [None]:
        if not _is_tool(call):
            raise BadRequest(f"{where}: tool_calls must be a list of calls with a function and its name", "messages")
        function = dict(call["function"])
        try:
            if isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"])
        except ValueError:
            raise BadRequest(f"{where}: the arguments of {function['name']} are not JSON", "messages") from None
        found.append({**call, "function": function})
    return found
