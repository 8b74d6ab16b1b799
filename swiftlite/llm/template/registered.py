"""A registered template as Jinja with generation tags: its own file in registered/, or its parts joined round by round."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from swiftlite.families.records import Part, TemplateMeta
from swiftlite.llm.template.agent import HERMES_HEAD, HERMES_TAIL

_HOLE = re.compile(r"\{\{(SYSTEM|QUERY|DATE)\}\}")
# Texts that several files share: each template that is saved holds those it needs.
_TEXTS = {"hermes_head": HERMES_HEAD, "hermes_tail": HERMES_TAIL}
_NAMES = {"SYSTEM": "system", "QUERY": "query.text", "DATE": "date"}


def source_of(meta: TemplateMeta, own_bos: str = "") -> str:
    """Jinja that writes this template. own_bos: what the tokenizer puts in front of a text by itself."""
    body = _file(meta.jinja) if meta.jinja else _rounds(meta, own_bos if meta.auto_add_bos else "")
    parameters = {**dict(meta.parameters), **{name: text for name, text in _TEXTS.items() if name in body}}
    head = "".join(f"{{%- set {name} = {_literal(value)} -%}}\n" for name, value in parameters.items())
    default = meta.default_system if meta.default_system is not None else ""
    head += (
        f"{{%- if default_system is not defined -%}}{{%- set default_system = {_literal(default)} -%}}{{%- endif -%}}\n"
    )
    return head + body


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / "registered" / f"{name}.jinja").read_text(encoding="utf-8")


def _literal(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _expression(parts: tuple[Part, ...]) -> str:
    """A Jinja expression for the text of template parts: literals, holes, names of special tokens."""
    words: list[str] = []
    for part in parts:
        if isinstance(part, str):
            for n, piece in enumerate(_HOLE.split(part)):
                words += [_NAMES[piece]] if n % 2 else [_literal(piece)] if piece else []
        else:
            words += [name.removesuffix("_id") for name in part]
    return " ~ ".join(words) or "''"


def _rounds(meta: TemplateMeta, own_bos: str) -> str:
    """prefix, then per round prompt and answer, chat_sep between rounds, suffix after the last answer.

    The prompt holds the assistant's header, so that a conversation that ends with a user message always ends with it.
    Messages in a row of one role are joined.
    """
    end, between = _split_end(meta)
    with_system = (
        f"{{{{- {_expression(meta.system_prefix)} -}}}}"
        if meta.system_prefix is not None
        else "{{- raise_exception('this template takes no system message') -}}"
    )
    return f"""{{%- set has_system = messages and messages[0].role == 'system' -%}}
{{%- set rounds = messages[1:] if has_system else messages -%}}
{{%- set system = messages[0].content + '' if has_system else default_system -%}}
{{%- set date = date_string if date_string is defined else strftime_now('%d %b %Y') -%}}
{{{{- {_literal(own_bos)} -}}}}
{{%- if system -%}}{with_system}{{%- else -%}}{{{{- {_expression(meta.prefix)} -}}}}{{%- endif -%}}
{{%- set query = namespace(text='') -%}}
{{%- for message in rounds -%}}
    {{%- set joins = not loop.last and loop.nextitem.role == message.role -%}}
    {{%- if message.role == 'user' -%}}
        {{%- set query.text = query.text + message.content -%}}
        {{%- if not joins -%}}{{{{- {_expression(meta.prompt)} -}}}}{{%- set query.text = '' -%}}{{%- endif -%}}
    {{%- elif message.role == 'assistant' and not message.tool_calls -%}}
        {{%- generation -%}}
            {{{{- message.content + '' -}}}}
            {{%- if loop.last -%}}{{{{- {_expression(meta.suffix)} -}}}}
            {{%- elif not joins -%}}{{{{- {end} -}}}}{{%- endif -%}}
        {{%- endgeneration -%}}
        {{%- if not loop.last and not joins -%}}{{{{- {between} -}}}}{{%- endif -%}}
    {{%- else -%}}
        {{{{- raise_exception('it knows one system message, then user and assistant, no ' ~ message.role ~ ' here: leave '
            ~ 'such rows out or choose another --template, or --agent_template hermes') -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
"""


def _split_end(meta: TemplateMeta) -> tuple[str, str]:
    """What ends an answer between rounds, as far as it is the token that ends the last one, and the rest of chat_sep."""
    separator, suffix = tuple(meta.chat_sep or ()), tuple(meta.suffix)
    if suffix and separator[: len(suffix)] == suffix:
        return _expression(suffix), _expression(separator[len(suffix) :])
    if len(separator) == len(suffix) == 1 and isinstance(separator[0], str) and isinstance(suffix[0], str):
        end = suffix[0].strip()
        if end and separator[0].startswith(end):
            return _literal(end), _literal(separator[0].removeprefix(end))
    return "''", _expression(separator)
