"""Does a registered template that was asked for write what the checkpoint's own one writes? Told when a run starts."""

from __future__ import annotations

import os
from collections.abc import Iterator

from swiftlite.llm.template.base import Template
from swiftlite.llm.template.jinja import ChatTemplate
from swiftlite.llm.template.messages import Tools
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

_ASKED: Json = {"role": "user", "content": "What is 2 + 2?"}
_THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is 4."
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
_TOOL: Json = {
    "type": "function",
    "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}},
}
_SYSTEM = {"role": "system", "content": "Be brief."}
_ROUNDS: list[Json] = [
    _ASKED,
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure?"},
]
_ANSWERED = [*_ROUNDS, {"role": "assistant", "content": "Yes, 4."}]
_CALLED: list[Json] = [
    _ASKED,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]

# name, messages, tools, generation prompt, options
Probe = tuple[str, list[Json], Tools | None, bool, Json]
PROBES: tuple[Probe, ...] = (
    ("question", [_ASKED], None, True, {}),
    ("system message", [_SYSTEM, _ASKED], None, True, {}),
    ("two rounds", _ANSWERED, None, False, {}),
    ("system message, two rounds", [_SYSTEM, *_ROUNDS], None, True, {}),
    ("thoughts", [_ASKED, {"role": "assistant", "content": _THOUGHT}], None, False, {}),
    ("earlier thoughts", [_ASKED, {"role": "assistant", "content": _THOUGHT}, *_ANSWERED], None, False, {}),
    ("thinking off", _ROUNDS, None, True, {"enable_thinking": False}),
    ("tools", [_ASKED], [_TOOL], True, {}),
    ("tool call", _CALLED, [_TOOL], False, {}),
)
_AROUND, _DATE = 30, "26 Jul 2024"


def differences(template: Template) -> Iterator[str]:
    """One line for each probe that a registered template writes otherwise than the tokenizer's own chat template.

    Nothing where there is none, or where the template is that.
    """
    tokenizer = template.tokenizer
    if template.chat.is_own or not template.use_chat_template or not getattr(tokenizer, "chat_template", None):
        return
    registered, own = (
        type(template)(template.meta, tokenizer, template_backend=backend).chat for backend in ("swift", "jinja")
    )
    try:
        texts = own.bounded(lambda: [_written(own, probe) for probe in PROBES])
    except TemplateError as error:
        yield f"it cannot be tried: {error}"
        return
    for probe, wanted in zip(PROBES, texts, strict=True):
        if wanted is None or (probe[2] and not registered.prints_tools() and not own.prints_tools()):
            continue  # a conversation that the model's own template refuses has no right text
        written = _written(registered, probe)
        if written is None:
            yield f"{probe[0]}: {registered.name} cannot write it"
        elif written != wanted:
            at = len(os.path.commonprefix([written, wanted]))
            ours, theirs = written[at : at + _AROUND], wanted[at : at + _AROUND]
            yield (
                f"{probe[0]}: from character {at} on, {registered.name} writes {ours!r}, the checkpoint's own chat template "
                f"{theirs!r}"
            )


def _written(chat: ChatTemplate, probe: Probe) -> str | None:
    _, messages, tools, generation, options = probe
    try:
        return chat.write(messages, tools, generation, {"date_string": _DATE, **options})
    except TemplateError:
        return None


def check_parity(template: Template, strict: bool = False) -> None:
    """Warn with the first difference. Raises: TemplateError with it where `strict`."""
    found = list(differences(template))
    if not found:
        return
    more = f" ({len(found)} of {len(PROBES)} probes differ)" if len(found) > 1 else ""
    message = f"{found[0]}{more}; without --template the checkpoint's is used"
    if strict:
        raise TemplateError(f"--strict_template true: {message}")
    get_logger().warning("%s; the trained checkpoint is given the text of %s", message, template.chat.name)
