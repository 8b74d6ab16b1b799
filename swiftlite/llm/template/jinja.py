"""Training from a tokenizer's own chat template: the text, and exactly which characters the assistant wrote.

A template with `{% generation %}` tags says so itself. Of others the text is written again for shorter and for changed
conversations; where the answers lie follows from what stays the same. What cannot be settled is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from swiftlite.llm.template.layouts.conversation import Message, function_of, role_of
from swiftlite.utils.bounded import SECONDS, LimitError, run_bounded
from swiftlite.utils.errors import TemplateError, UsageError

Found = list[list[int]]  # start, end, index of the message; characters of the text
Write = Callable[[Sequence[Message], bool], str]
T = TypeVar("T")

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Contents that share no first and no last character with each other.
_MARKS = ("⁂first⁑", "※second⁜")


def jinja_spans(
    tokenizer: Any, messages: Sequence[Message], tools: Any, options: dict[str, Any], stop_words: Sequence[str]
) -> tuple[str, Found]:
    """The conversation as the tokenizer's chat template writes it, and the span of each assistant message in it.

    Args: stop_words: what ends an answer; a span ends before it.
    Raises: UsageError if there is no chat template; TemplateError if it cannot write the conversation, or where its
        answers lie cannot be settled.
    """
    source = chat_template_of(tokenizer, tools)
    if _GENERATION_TAG.search(source):
        return _tagged(tokenizer, source, messages, tools, options)

    def write(part: Sequence[Message], generation: bool) -> str:
        return write_jinja(tokenizer, part, tools, generation, options)

    def write_plain(part: Sequence[Message], generation: bool) -> str:
        chosen = {key: value for key, value in options.items() if key != "enable_thinking"}
        return write_jinja(tokenizer, part, tools, generation, chosen)

    text = write(messages, False)
    writers = (write, write_plain) if "enable_thinking" in options else (write,)
    finder = _Finder(writers, list(messages), text, stop_words)
    return text, [finder.span(i) for i, message in enumerate(messages) if role_of(message) == "assistant"]


def chat_template_of(tokenizer: Any, tools: Any = None) -> str:
    """Source of the chat template. Raises: UsageError if the tokenizer has none."""
    try:
        source = tokenizer.get_chat_template(tools=tools)
    except (ValueError, AttributeError):
        source = None
    if not source:
        raise UsageError(
            "--template_backend jinja: the tokenizer has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); add one, or use --template_backend swift with --template NAME"
        )
    return str(source)


def write_jinja(
    tokenizer: Any, messages: Sequence[Message], tools: Any, generation: bool, options: dict[str, Any]
) -> str:
    """The conversation by the tokenizer's chat template. Raises: TemplateError where it cannot write it."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=generation, tokenize=False, **options
            )
        )
    except Exception as error:  # whatever a template raises or trips over
        line = " ".join(str(error).split())[:200]
        raise TemplateError(f"the tokenizer's chat template cannot write the conversation ({line})") from None


# Rows whose text is out of bounds before the template itself is to blame.
_MAX_UNBOUNDED = 3


def bounded_prompt(write: Callable[[], T]) -> T:
    """A text that the tokenizer's chat template writes, within bounds. Raises: TemplateError, also beyond them."""
    try:
        return run_bounded(write)
    except LimitError as error:
        raise TemplateError(f"the tokenizer's chat template cannot write the conversation: {error}") from None


def bounded_rows(write: Callable[[Any], Any], rows: Sequence[Any]) -> list[Any]:
    """`[write(row) for row in rows]` for a write that uses a tokenizer's chat template.

    They are written in a child together; if that is beyond bounds, in one each, where such a row gets a TemplateError.
    Raises: UsageError where the template itself is to blame, which row after row shows.
    """
    if len(rows) > 1:
        try:
            return run_bounded(lambda: [write(row) for row in rows], SECONDS + 0.1 * len(rows))
        except LimitError:
            pass  # one of them, which is found below
    found: list[Any] = []
    failed = 0
    for row in rows:
        try:
            found.append(run_bounded(lambda row=row: write(row)))  # type: ignore[misc]
        except LimitError as error:
            failed += 1
            if failed > _MAX_UNBOUNDED:
                raise UsageError(
                    f"--template_backend jinja: the checkpoint's chat template cannot be used: {error}; use "
                    "--template_backend swift with --template NAME"
                ) from None
            found.append(TemplateError(f"the chat template cannot write it: {error}"))
    return found


def _tagged(
    tokenizer: Any, source: str, messages: Sequence[Message], tools: Any, options: dict[str, Any]
) -> tuple[str, Found]:
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {**getattr(tokenizer, "special_tokens_map", {}), **options}
    try:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=tools,
            chat_template=source,
            return_assistant_tokens_mask=True,
            **names,
        )
    except Exception as error:  # as in write_jinja
        line = " ".join(str(error).split())[:200]
        raise TemplateError(f"the tokenizer's chat template cannot write the conversation ({line})") from None
    answers = [i for i, message in enumerate(messages) if role_of(message) == "assistant"]
    (text,), (indices,) = rendered
    spans = [[start, end] for start, end in indices]
    if len(spans) != len(answers):
        raise TemplateError(
            f"the chat template marks {len(spans)} spans with generation tags for {len(answers)} assistant messages; "
            "mend the template or use --template_backend swift"
        )
    return text, [[*span, index] for span, index in zip(spans, answers, strict=True)]


class _Finder:
    """Where the answers lie in `text`, the whole conversation as the first of `writers` gives it.

    A second writer has another generation prompt: with thinking off, the prompt holds an empty thought block, but an
    answer that thinks nevertheless stands behind the other prompt.
    """

    def __init__(self, writers: Sequence[Write], messages: list[Message], text: str, stop_words: Sequence[str]) -> None:
        self.writers, self.messages, self.text, self.stop_words = writers, messages, text, stop_words

    def span(self, index: int) -> list[int]:
        """[start, end, index] of an assistant message."""
        before, after = self._try(self.messages[:index], True), self._try(self.messages[: index + 1], False)
        region: tuple[int, int] | None = None
        if before is not None and self.text.startswith(before):
            start = len(before)
        else:
            region = self._region(index)
            start = self._start(index, region)
        if after is not None and self.text.startswith(after) and len(after) >= start:
            end = self._without_stop(start, len(after))
        else:
            end = (region or self._region(index))[1]
        self._check(index, start, end)
        return [start, end, index]

    def _try(self, messages: list[Message], generation: bool, write: Write | None = None) -> str | None:
        try:
            return (write or self.writers[0])(messages, generation)
        except TemplateError:
            return None

    def _without_stop(self, start: int, end: int) -> int:
        body = self.text[start:end].rstrip()
        stop = next((s for s in self.stop_words if body.endswith(s)), None)
        return end if stop is None else start + len(body) - len(stop)

    def _region(self, index: int) -> tuple[int, int]:
        """The part of the text that changes with a message's content: the rest is the same for every content."""
        head = tail = len(self.text)
        for mark in _MARKS:
            changed = {"role": self.messages[index]["role"], "content": mark}
            other = self._try([*self.messages[:index], changed, *self.messages[index + 1 :]], False)
            if other is None:
                raise self._unsettled(index, "a changed conversation cannot be written")
            head = min(head, len(os.path.commonprefix([self.text, other])))
            tail = min(tail, len(os.path.commonprefix([self.text[::-1], other[::-1]])))
        return head, max(head, len(self.text) - tail)

    def _prompts(self, index: int) -> list[str]:
        """What a generation prompt before this message adds to the text."""
        prompts = []
        for write in self.writers:
            before = self._try(self.messages[:index], True, write)
            without = self._try(self.messages[:index], False, write)
            if before is not None and without is not None and before.startswith(without):
                prompts.append(before[len(without) :])
        return [prompt for prompt in prompts if prompt]

    def _start(self, index: int, region: tuple[int, int]) -> int:
        """The answer begins behind the generation prompt, or behind as much of it as the text has."""
        head, lower = region[0], self._region(index - 1)[1] if index else 0
        prompts = self._prompts(index)
        if not prompts or lower > head:
            raise self._unsettled(index, "no generation prompt stands before it")
        for prompt in prompts:
            at = self.text.rfind(prompt, lower, head)
            if at >= 0:
                return at + len(prompt)
        if not any(self.text.endswith(p[:k], lower, head) for p in prompts for k in range(len(p), 0, -1)):
            raise self._unsettled(index, "it does not follow the generation prompt")
        return head

    def _check(self, index: int, start: int, end: int) -> None:
        message = self.messages[index]
        content, calls = message.get("content"), message.get("tool_calls")
        wanted = [content.split("</think>")[-1].strip() if isinstance(content, str) else ""]
        if calls:  # some templates leave out the text beside a call
            wanted.append(str(function_of(calls[-1])["name"]))
        if start > end or not any(part in self.text[start:end] for part in wanted):
            raise self._unsettled(index, "its content is not where it should be")

    def _unsettled(self, index: int, why: str) -> TemplateError:
        return TemplateError(
            f"where message {index} (assistant) stands in the chat template's text cannot be settled: {why}; put "
            "{% generation %} tags into the template, or use --template_backend swift"
        )
