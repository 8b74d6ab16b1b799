"""Does the registered template write what the checkpoint's own Jinja writes? Asked once, when a run starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from swiftlite.llm.template.base import Template
from swiftlite.llm.template.jinja import write_jinja
from swiftlite.llm.template.layouts import PRINTS_TOOLS
from swiftlite.llm.template.layouts.llama import DEFAULT_DATE
from swiftlite.utils.bounded import LimitError, run_bounded
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.logger import get_logger

_ASKED: dict[str, Any] = {"role": "user", "content": "What is 2 + 2?"}
_THOUGHT = "<think>\nTwo and two.\n</think>\n\nIt is 4."
_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Add", "parameters": {"type": "object", "properties": {}}},
}
_SYSTEM = {"role": "system", "content": "Be brief."}
_ROUNDS: list[dict[str, Any]] = [
    _ASKED,
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Sure?"},
]
_ANSWERED = [*_ROUNDS, {"role": "assistant", "content": "Yes, 4."}]
_CALLED: list[dict[str, Any]] = [
    _ASKED,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]

# name, messages, tools, generation prompt, options
PROBES: tuple[tuple[str, list[dict[str, Any]], Any, bool, dict[str, Any]], ...] = (
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
_AROUND = 30


def differences(template: Template) -> Iterator[str]:
    """One line for each probe that the tokenizer's Jinja writes differently. Nothing where there is no Jinja."""
    tokenizer = template.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return
    plain = type(template)(template.meta, tokenizer)
    try:
        texts = run_bounded(lambda: [_written(tokenizer, *probe[1:]) for probe in PROBES])
    except LimitError as error:
        yield f"it cannot be tried: {error}"
        return
    for (name, messages, tools, generation, options), wanted in zip(PROBES, texts, strict=True):
        if tools and template.meta.layout not in PRINTS_TOOLS and not _prints_tools(tokenizer):
            continue
        options = {"date_string": DEFAULT_DATE, **options}
        if wanted is None:
            continue  # a conversation that the model's own template refuses has no right text
        try:
            written = plain.render(messages, tools, generation, **options)
        except TemplateError as error:
            yield f"{name}: template {template.template_type!r} cannot write it ({error})"
            continue
        if written != wanted:
            at = len(os.path.commonprefix([written, wanted]))
            ours, theirs = written[at : at + _AROUND], wanted[at : at + _AROUND]
            yield (
                f"{name}: from character {at} on, template {template.template_type!r} writes {ours!r}, the checkpoint's "
                f"own chat template {theirs!r}"
            )


def _written(tokenizer: Any, messages: Any, tools: Any, generation: bool, options: dict[str, Any]) -> str | None:
    try:
        return write_jinja(tokenizer, messages, tools, generation, {"date_string": DEFAULT_DATE, **options})
    except TemplateError:
        return None


def _prints_tools(tokenizer: Any) -> bool:
    return "tools" in str(tokenizer.chat_template)


def check_parity(template: Template, strict: bool = False) -> None:
    """Warn with the first difference. Raises: TemplateError with it where `strict`."""
    if template.template_backend == "jinja" or not template.use_chat_template:
        return
    found = list(differences(template))
    if not found:
        return
    more = f" ({len(found)} of {len(PROBES)} probes differ)" if len(found) > 1 else ""
    message = f"{found[0]}{more}; --template_backend jinja uses the checkpoint's"
    if strict:
        raise TemplateError(f"--strict_template true: {message}")
    get_logger().warning("%s; what is trained or asked differs from what others serve", message)
