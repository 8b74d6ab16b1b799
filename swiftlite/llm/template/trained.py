"""What servers read from a trained checkpoint: a chat template that writes what was trained, and where answers end.

A base model taught to chat has neither; its checkpoint gets both.
"""

from __future__ import annotations

import json
from typing import Any

from swiftlite.checkpoint.chat import Chat
from swiftlite.llm.template.base import IGNORE_INDEX, Template
from swiftlite.llm.template.jinja import write_jinja
from swiftlite.llm.template.parity import PROBES
from swiftlite.utils.bounded import LimitError, run_bounded
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.logger import get_logger

_BASIC = PROBES[:4]  # without thoughts and tools
_MARKS = ("⁂a⁑", "※b⁜", "⁂c⁑", "※d⁜")


def trained_chat(template: Template) -> Chat | None:
    """What training with this template teaches; None for training on plain text."""
    if not template.use_chat_template:
        return None
    end, jinja = _end_token(template), None
    if end is None:
        get_logger().warning(
            "template %r ends answers with text that is no special token: servers need it as a stop word",
            template.template_type,
        )
    if template.template_backend == "swift" and not _writes(template, None):
        jinja = write_chat_template(template)
        if jinja is None:
            get_logger().warning(
                "the checkpoint's chat template does not write what template %r trains: serve it with that template",
                template.template_type,
            )
    return Chat(jinja, end)


def _end_token(template: Template) -> int | None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, spans = template.training_text({"messages": messages})
    except TemplateError:
        return None
    ids = template.tokenize(text[: int(spans[-1][1])]) if spans else []
    special = {*template.tokenizer.all_special_ids, *getattr(template.tokenizer, "added_tokens_decoder", {})}
    return ids[-1] if ids and ids[-1] in special and ids[-1] != IGNORE_INDEX else None


def _writes(template: Template, jinja: str | None) -> bool:
    """Whether a chat template (None: the tokenizer's own) writes basic conversations as this template does.

    One that takes more time or memory than such conversations need does not.
    """
    try:
        return run_bounded(lambda: _writes_all(template, jinja))
    except LimitError:
        return False


def _writes_all(template: Template, jinja: str | None) -> bool:
    if jinja is None and not getattr(template.tokenizer, "chat_template", None):
        return False
    plain = Template(template.meta, template.tokenizer, agent_template=None)
    options: dict[str, Any] = {} if jinja is None else {"chat_template": jinja}
    for _, messages, tools, generation, extra in _BASIC:
        try:
            wanted = {plain.render(messages, tools, generation, **extra)}
        except TemplateError:
            continue
        if not generation:
            wanted.add(plain.training_text({"messages": messages})[0])
        try:
            if write_jinja(template.tokenizer, messages, tools, generation, {**extra, **options}) not in wanted:
                return False
        except TemplateError:
            return False
    return True


def write_chat_template(template: Template) -> str | None:
    """Jinja for system, user and assistant messages, from what stands around them; None if it cannot be written so."""
    plain = Template(template.meta, template.tokenizer)
    a, b, c, d = _MARKS
    user, answer = {"role": "user", "content": a}, {"role": "assistant", "content": b}
    rounds = [user, answer, {"role": "user", "content": c}, {"role": "assistant", "content": d}]
    try:
        opening = plain.render([user], add_generation_prompt=True).split(a)[1]
        bare = plain.render([user]).split(a)[1]
        start, first, between, last, end = _around(plain.training_text({"messages": rounds})[0], _MARKS)
    except (TemplateError, IndexError, ValueError):
        return None
    try:
        system = [{"role": "system", "content": b}, user]
        before, after, _ = _around(plain.render(system, add_generation_prompt=True), (b, a))
        head = f"{{{{ {_quoted(before)} + messages[0]['content'] + {_quoted(after)} }}}}"
    except (TemplateError, ValueError):
        head = "{{ raise_exception('this model takes no system message') }}"
    jinja = (
        "{%- if messages[0]['role'] == 'system' -%}" + head + "{%- set rounds = messages[1:] -%}"
        "{%- else -%}{{ " + _quoted(start) + " }}{%- set rounds = messages -%}{%- endif -%}"
        "{%- for message in rounds -%}{%- if message['role'] == 'user' -%}"
        "{{ ('' if loop.first else " + _quoted(between) + ") + message['content'] + "
        "(" + _quoted(opening) + " if loop.last and add_generation_prompt else " + _quoted(bare) + " if loop.last else "
        + _quoted(last) + " if loop.index == loop.length - 1 else " + _quoted(first) + ") }}"
        "{%- elif message['role'] == 'assistant' -%}{{ message['content'] + (" + _quoted(end) + " if loop.last else '') }}"
        "{%- else -%}{{ raise_exception('this chat template writes system, user and assistant messages only') }}"
        "{%- endif -%}{%- endfor -%}"
    )  # fmt: skip
    return jinja if _writes(template, jinja) else None


def _around(text: str, marks: tuple[str, ...]) -> list[str]:
    """What stands before, between and after the marks. Raises: ValueError if one is not there exactly once, in order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(mark)
        parts.append(part)
    return [*parts, text]


def _quoted(text: str) -> str:
    return json.dumps(text)
