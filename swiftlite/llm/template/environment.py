"""Jinja as transformers offers it to chat templates, with marks around what generation tags hold.

A registered template is part of the program. A checkpoint's own is not: it is written in Jinja's sandbox.
"""

from __future__ import annotations

import json
import marshal
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Around what generation tags hold. No data holds them but on purpose.
_BEGIN, _END = f"\ue000{secrets.token_hex(8)}\ue001", f"\ue002{secrets.token_hex(8)}\ue003"
_OF_DICTS = frozenset(dir(dict))
# Methods that the sandbox has nothing to say about; it replaces the two that read a format.
_OF_TEXT = frozenset(name for name in dir(str) if not name.startswith("_") and not name.startswith("format"))
_VALUES = (bool, int, str, list, dict)
_OF_LOOPS = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))


@dataclass(frozen=True)
class Read:
    """A template's Python code, by marshal, and the variables and attributes that it reads."""

    code: bytes
    names: frozenset[str]


class _Quick(Environment):
    """What `a.b` gives for the types that templates are full of, as Jinja gives it, without trying and failing."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict and attribute not in _OF_DICTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is str and attribute in _OF_TEXT) or (kind is LoopContext and attribute in _OF_LOOPS):
            return getattr(obj, attribute)
        if kind is Namespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _VALUES:
                return value
        return super().getattr(obj, attribute)


class _QuickSandbox(_Quick, ImmutableSandboxedEnvironment):
    pass


class _Generation(Extension):
    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_BEGIN, _END))
        return nodes.Scope([begin, *body, end])


@cache
def _environment(sandboxed: bool) -> Environment:
    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    kind = _QuickSandbox if sandboxed else _Quick
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_READ: dict[tuple[str, bool], Read] = {}


@cache
def _compiled(source: str, sandboxed: bool) -> Template:
    environment = _environment(sandboxed)
    read = _READ.get((source, sandboxed))
    code = marshal.loads(read.code) if read else environment.compile(source)
    return Template.from_code(environment, code, environment.make_globals(None))


def read_template(source: str, sandboxed: bool) -> Read:
    """What a template is, for `keep`. To be made within bounds: what is constant in it is computed."""
    environment = _environment(sandboxed)
    tree = environment.parse(source)
    names = {node.attr for node in tree.find_all(nodes.Getattr)} | {
        node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)
    }
    names |= meta.find_undeclared_variables(tree)
    return Read(marshal.dumps(environment.compile(source)), frozenset(map(str, names)))


def kept(source: str, sandboxed: bool) -> Read | None:
    """What `keep` got in this process."""
    return _READ.get((source, sandboxed))


def keep(source: str, sandboxed: bool, read: Read) -> None:
    """Let this process, and those that it forks, have the code of a template at hand."""
    _READ[source, sandboxed] = read
    _compiled(source, sandboxed)


def write_marked(source: str, sandboxed: bool, names: Mapping[str, object]) -> str:
    """The text of a template, what generation tags hold between marks. Raises: whatever a template raises."""
    return str(_compiled(source, sandboxed).render(names))


def without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text, and where in it stands what was between marks."""
    text, *answers = marked.split(_BEGIN)
    found = []
    for part in answers:
        answer, _, rest = part.partition(_END)
        found.append((len(text), len(text) + len(answer)))
        text += answer + rest
    return text, found
