"""A chat template: the text of any conversation, and where in it the answers lie.

It is the checkpoint's own, whose text is never trusted with more than the sandbox and the bounds of utils/bounded.py
allow, or a registered one (registered.py). A template with `{% generation %}` tags says itself where answers lie; of
others it is found out (answers.py).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from swiftlite.llm.template.answers import AnswerFinder, Found
from swiftlite.llm.template.messages import Message, Tools, role_of
from swiftlite.utils.bounded import SECONDS, LimitError, run_bounded, run_each_bounded
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json, Settings

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2 import Template as JinjaTemplate
    from jinja2.parser import Parser
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Rows whose text is out of bounds before the template itself is to blame.
_MAX_UNBOUNDED = 3
_ROWS_AT_ONCE = 32


class ChatTemplate:
    """What one Jinja text writes for a tokenizer.

    Args:
        registered: Jinja of a registered template; None: the tokenizer's own.
        name: what messages call it. tokens: the tokenizer's special tokens by attribute name, absent ones missing.
        ends: what may end an answer, the longest first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        registered: str | None,
        name: str,
        tokens: Mapping[str, str],
        ends: Sequence[str],
    ) -> None:
        self.tokenizer, self.registered = tokenizer, registered
        self.name = name
        self.tokens, self.ends = dict(tokens), tuple(ends)
        self._finders: dict[str, AnswerFinder] = {}

    @property
    def is_own(self) -> bool:
        """Whether it is the checkpoint's, whose text may do anything that Jinja can."""
        return self.registered is None

    def source(self, tools: Tools | None = None) -> str:
        """The Jinja. Raises: UsageError if the tokenizer has none."""
        return self.registered if self.registered is not None else chat_template_of(self.tokenizer, tools)

    def is_tagged(self, tools: Tools | None = None) -> bool:
        """Whether it has generation tags, which may hold the end token of an answer too."""
        return _has_generation_tags(self.source(tools))

    def prints_tools(self) -> bool:
        return "tools" in _names_read(self.source())

    def prints_calls(self) -> bool:
        return "arguments" in _names_read(self.source())

    def write(self, messages: Sequence[Message], tools: Tools | None, generation: bool, options: Settings) -> str:
        """The conversation as text; generation: with what opens the next answer. Raises: TemplateError."""
        try:
            if self.registered is not None:
                return str(self._written(messages, tools, options, generation).replace(_BEGIN, "").replace(_END, ""))
            keywords: Settings = {**options, "tools": tools, "add_generation_prompt": generation}
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **keywords))
        except Exception as error:  # whatever a template raises or trips over
            raise self._refused(error) from None

    def write_answers(self, messages: Sequence[Message], tools: Tools | None, options: Settings) -> tuple[str, Found]:
        """The conversation as text, and [start, end, index] of each assistant message in it.

        Raises: TemplateError if it cannot be written, or where its answers lie cannot be settled.
        """
        if self.is_tagged(tools):
            return self._tagged(messages, tools, options)
        return self._finder(options).find(messages, tools)

    def learn(self, options: Settings) -> None:
        """Find out, within bounds, what helps `write_answers` with these options; before children need it."""
        if not self.is_tagged():
            finder = self._finder(options)
            finder.headers = self.bounded(finder.learn)

    def _finder(self, options: Settings) -> AnswerFinder:
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._finders:
            self._finders[key] = AnswerFinder(self.write, options, self.ends, self.tokens.get("eos_token", ""))
        return self._finders[key]

    def _tagged(self, messages: Sequence[Message], tools: Tools | None, options: Settings) -> tuple[str, Found]:
        try:
            if self.registered is not None:
                text, found = _without_marks(self._written(messages, tools, options))
            else:
                from transformers.utils.chat_template_utils import render_jinja_template

                names: Settings = {**self.tokenizer.special_tokens_map, **options, "tools": tools}
                rendered: Any = render_jinja_template(
                    conversations=[list(messages)], chat_template=self.source(tools), return_assistant_tokens_mask=True,
                    **names,
                )  # fmt: skip
                (text,), (found,) = rendered
        except Exception as error:  # as in write
            raise self._refused(error) from None
        answers = [i for i, message in enumerate(messages) if role_of(message) == "assistant"]
        if len(found) != len(answers):
            raise TemplateError(
                f"{self.name} marks {len(found)} spans with generation tags for {len(answers)} assistant messages; "
                "fix the template, or choose a registered one with --template NAME"
            )
        return text, [[start, end, index] for (start, end), index in zip(found, answers, strict=True)]

    def _written(
        self, messages: Sequence[Message], tools: Tools | None, options: Settings, generation: bool = False
    ) -> str:
        """The text of a registered template, its answers between marks."""
        names = {"documents": None, **self.tokens, **options}
        template = _compiled(str(self.registered))
        return str(template.render(messages=list(messages), tools=tools, add_generation_prompt=generation, **names))

    def _refused(self, error: Exception) -> TemplateError:
        return TemplateError(f"{self.name} cannot write the conversation ({one_line(error)})")

    def bounded(self, write: Callable[[], T]) -> T:
        """What `write` makes with this template, within bounds if that is the checkpoint's. Raises: TemplateError."""
        if not self.is_own:
            return write()
        try:
            return run_bounded(write)
        except LimitError as error:
            raise TemplateError(f"{self.name} cannot write the conversation: {error}") from None

    def bounded_rows(self, write: Callable[[Json], T], rows: Sequence[Json]) -> Iterator[list[T | TemplateError]]:
        """`write(row)` of all rows, in lists of some, within bounds if the template is the checkpoint's.

        They are written in a child, which continues while the caller works on a list. If that is beyond bounds, the rows
        of a list are written in a child each, where such a row gets a TemplateError.
        Raises: UsageError where the template itself is to blame, which row after row shows.
        """
        parts = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
        if not self.is_own:
            for part in parts:
                yield [write(row) for row in part]
            return
        done = 0
        while done < len(parts):
            works = [lambda part=part: [write(row) for row in part] for part in parts[done:]]  # type: ignore[misc]
            try:
                for written in run_each_bounded(works, SECONDS + 0.1 * len(rows)):
                    done += 1
                    yield [*written]
            except LimitError:  # a row, which is found in there
                done += 1
                yield self._one_by_one(write, parts[done - 1])

    def _one_by_one(self, write: Callable[[Json], T], rows: Sequence[Json]) -> list[T | TemplateError]:
        found: list[T | TemplateError] = []
        failed = 0
        for row in rows:
            try:
                found.append(run_bounded(lambda row=row: write(row)))  # type: ignore[misc]
            except LimitError as error:
                failed += 1
                if failed > _MAX_UNBOUNDED:
                    raise UsageError(
                        f"{self.name} cannot be used: {error}; choose a registered one with --template NAME"
                    ) from None
                found.append(TemplateError(f"{self.name} cannot write it: {error}"))
        return found


@cache  # asked of every row
def _has_generation_tags(source: str) -> bool:
    return bool(_GENERATION_TAG.search(source))


@cache
def _names_read(source: str) -> frozenset[str]:
    """Variables and attributes that a template reads. It is parsed, not run; nothing where it is not Jinja."""
    from jinja2 import TemplateSyntaxError, meta, nodes

    try:
        tree = _environment().parse(source)
    except (TemplateSyntaxError, RecursionError):
        return frozenset()
    names = {node.attr for node in tree.find_all(nodes.Getattr)} | {
        node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)
    }
    return frozenset(map(str, meta.find_undeclared_variables(tree) | names))


# Around what generation tags hold, in the text of a registered template. No data holds them but on purpose.
_BEGIN, _END = f"\ue000{secrets.token_hex(8)}\ue001", f"\ue002{secrets.token_hex(8)}\ue003"


@cache
def _environment() -> Environment:
    """Jinja for registered templates, which are part of the program: what transformers offers, without its sandbox."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (_BEGIN, _END))
            return [begin, *body, end]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@cache
def _compiled(source: str) -> JinjaTemplate:
    return _environment().from_string(source)


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, *answers = marked.split(_BEGIN)
    found = []
    for part in answers:
        answer, _, rest = part.partition(_END)
        found.append((len(text), len(text) + len(answer)))
        text += answer + rest
    return text, found


def chat_template_of(tokenizer: PreTrainedTokenizerBase, tools: Tools | None = None) -> str:
    """Source of a tokenizer's chat template. Raises: UsageError if it has none."""
    try:
        source = tokenizer.get_chat_template(tools=tools)
    except (ValueError, AttributeError):
        source = None
    if not source:
        raise UsageError(
            "the tokenizer has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); add "
            "one, or choose a registered one with --template NAME"
        )
    return str(source)
