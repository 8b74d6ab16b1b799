"""A chat template: the text of any conversation, and where in it the answers lie.

It is the checkpoint's own, whose text is never trusted with more than the sandbox and the bounds of utils/bounded.py
allow, or a registered one (registered.py). A template with `{% generation %}` tags says itself where answers lie; of
others it is found out (answers.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Generic, TypeVar

from swiftlite.llm.template.answers import AnswerFinder, Found
from swiftlite.llm.template.messages import Message, Tools, is_plain, role_of
from swiftlite.utils.bounded import SECONDS, BoundedChild, LimitError, run_bounded
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.text import one_line
from swiftlite.utils.types import Json, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Rows whose text is out of bounds before the template itself is to blame.
_MAX_UNBOUNDED = 3
_ROWS_AT_ONCE = 32
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        self._end = re.compile("|".join(map(re.escape, ends)) or "(?!)")  # an alternative that is first is taken
        self._finders: dict[str, AnswerFinder] = {}
        self._read: dict[str, frozenset[str]] = {}

    @property
    def is_own(self) -> bool:
        """Whether it is the checkpoint's, whose text may do anything that Jinja can."""
        return self.registered is None

    def source(self, tools: Tools | None = None) -> str:
        """The Jinja. Raises: UsageError if the tokenizer has none."""
        return self.registered if self.registered is not None else chat_template_of(self.tokenizer, tools)

    def is_tagged(self, tools: Tools | None = None) -> bool:
        """Whether it has generation tags, which may hold the end token of an answer too."""
        return has_generation_tags(self.source(tools))

    def prints_tools(self) -> bool:
        return "tools" in self._names()

    def prints_calls(self) -> bool:
        return "arguments" in self._names()

    def write(self, messages: Sequence[Message], tools: Tools | None, generation: bool, options: Settings) -> str:
        """The conversation as text; generation: with what opens the next answer. Raises: TemplateError."""
        from swiftlite.llm.template.environment import without_marks

        return without_marks(self._written(messages, tools, options, generation))[0]

    def write_answers(self, messages: Sequence[Message], tools: Tools | None, options: Settings) -> tuple[str, Found]:
        """The conversation as text, and [start, end, index] of each assistant message in it.

        Raises: TemplateError if it cannot be written, or where its answers lie cannot be settled.
        """
        if self.is_tagged(tools):
            return self._tagged(messages, tools, options)
        return self._finder(options).find(messages, tools)

    def end_at(self, text: str, position: int) -> str:
        """The token that may end an answer there, else nothing."""
        found = self._end.match(text, position)
        return found[0] if found else ""

    def learn(self, options: Settings) -> None:
        """Find out, within bounds, what helps `write_answers` with these options; before children need it."""
        if not self.is_tagged():
            finder = self._finder(options)
            finder.headers = self.bounded(finder.learn)

    def _finder(self, options: Settings) -> AnswerFinder:
        key = repr(sorted(options.items()))
        if key not in self._finders:
            self._finders[key] = AnswerFinder(self.write, options, self.ends, self.tokens.get("eos_token", ""))
        return self._finders[key]

    def _tagged(self, messages: Sequence[Message], tools: Tools | None, options: Settings) -> tuple[str, Found]:
        from swiftlite.llm.template.environment import without_marks

        text, found = without_marks(self._written(messages, tools, options))
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
        """The text, what generation tags hold between marks. Raises: TemplateError."""
        from swiftlite.llm.template.environment import write_marked

        try:
            if self.registered is not None:
                names = {**self.tokens, **options, "messages": list(messages), "tools": tools}
            elif self._has_stock_method:
                messages, tools = self._as_given(messages, tools)
                names = {**self._special_tokens, **options, "messages": messages, "tools": tools}
            else:
                keywords: Settings = {**options, "tools": tools, "add_generation_prompt": generation}
                return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **keywords))
            names = {**names, "documents": None, "add_generation_prompt": generation}
            return write_marked(self.source(tools), self.is_own, names)
        except Exception as error:  # whatever a template raises or trips over
            raise self._refused(error) from None

    @cached_property
    def _has_stock_method(self) -> bool:
        """Whether the tokenizer writes conversations as transformers does, by its Jinja."""
        from transformers import PreTrainedTokenizerBase

        return type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    @cached_property
    def _special_tokens(self) -> Settings:
        return dict(self.tokenizer.special_tokens_map)

    def _as_given(self, messages: Sequence[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages and tools as transformers gives them to a template: what it makes of them depends on its version."""
        if not messages:
            raise ValueError("no messages")
        if tools is None and all(map(is_plain, messages)):
            return list(messages), None
        show: Settings = {"tools": tools, "chat_template": "{{ [messages, tools] | tojson }}", "tokenize": False}
        messages, tools = json.loads(str(self.tokenizer.apply_chat_template(list(messages), **show)))
        return list(messages), tools

    def _refused(self, error: Exception) -> TemplateError:
        return TemplateError(f"{self.name} cannot write the conversation ({one_line(error)})")

    def _names(self, tools: Tools | None = None) -> frozenset[str]:
        """Variables and attributes that the template reads; nothing where it is not Jinja.

        Its code is at hand afterwards: each child would compile it anew.
        """
        source = self.source(tools)
        if source not in self._read:
            from jinja2 import TemplateSyntaxError

            from swiftlite.llm.template.environment import keep, kept, read_template

            work = partial(read_template, source, self.is_own)
            try:
                read = kept(source, self.is_own) or (run_bounded(work) if self.is_own else work())
                keep(source, self.is_own, read)
                self._read[source] = read.names
            except (LimitError, TemplateSyntaxError, RecursionError):  # told by what is written with it
                self._read[source] = frozenset()
        return self._read[source]

    def bounded(self, write: Callable[[], T]) -> T:
        """What `write` makes with this template, within bounds if that is the checkpoint's. Raises: TemplateError."""
        if not self.is_own:
            return write()
        _ = self._names(), self._names([]), self._has_stock_method, self._special_tokens
        try:
            return run_bounded(write)
        except LimitError as error:
            raise TemplateError(f"{self.name} cannot write the conversation: {error}") from None


class RowWriter(Generic[T]):
    """`write(row)` of many rows; is_bounded: within bounds, in a child that is made now. name: of the template.

    The child continues while the caller works on a list. If a list is beyond bounds, its rows are written one by one, where
    such a row gets a TemplateError.
    """

    def __init__(self, write: Callable[[Json], T], is_bounded: bool, name: str) -> None:
        self._write, self._is_bounded = write, is_bounded
        self._name, self._failed = name, 0
        self._child = self._start()

    def _start(self) -> BoundedChild[Sequence[Json], list[T]] | None:
        return BoundedChild(self._write_all) if self._is_bounded else None

    def _write_all(self, rows: Sequence[Json]) -> list[T]:
        return [self._write(row) for row in rows]

    def close(self) -> None:
        if self._child is not None:
            self._child.end()

    def __call__(self, rows: Sequence[Json]) -> Iterator[list[T | TemplateError]]:
        """In lists of some. Raises: UsageError where the template itself is to blame, which row after row shows."""
        parts = [rows[i : i + _ROWS_AT_ONCE] for i in range(0, len(rows), _ROWS_AT_ONCE)]
        if self._child is None:
            for part in parts:
                yield [*self._write_all(part)]
            return
        if not self._child.is_ready:  # the caller left the last rows in the middle
            self._child.end()
            self._child = self._start()
        done = 0
        self._failed = 0
        while done < len(parts):
            assert self._child is not None
            try:
                for written in self._child.ask(parts[done:], SECONDS + 0.1 * len(rows)):
                    done += 1
                    yield [*written]
            except LimitError:  # a row, which is found in there
                self._child = self._start()
                done += 1
                yield [self._alone(row) for row in parts[done - 1]]

    def _alone(self, row: Json) -> T | TemplateError:
        assert self._child is not None
        try:
            return next(self._child.ask([[row]]))[0]
        except LimitError as error:
            self._child = self._start()
            self._failed += 1
            if self._failed > _MAX_UNBOUNDED:
                raise UsageError(
                    f"{self._name} cannot be used: {error}; choose a registered one with --template NAME"
                ) from None
            return TemplateError(f"{self._name} cannot write it: {error}")


@cache  # asked of every row
def has_generation_tags(source: str) -> bool:
    return bool(_GENERATION_TAG.search(source))


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
