"""Where the answers lie in a text that a chat template without `{% generation %}` tags writes.

The sure way writes the conversation again, shorter and with changed contents: where an answer lies follows from what
stays the same, and what cannot be settled is an error. That costs several texts a row. Most templates open each answer
with one header and end it with one token; where a template has shown in trials that it does, one text is enough, and
rows now and then are still settled both ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from swiftlite.llm.template.messages import Message, Tools, function_of, role_of
from swiftlite.utils.errors import TemplateError

Found = list[list[int]]  # start, end, index of the message; characters of the text
Write = Callable[[Sequence[Message], bool], str]

# Contents that share no first and no last character with each other.
_MARKS = ("⁂first⁑", "※second⁜")
_QUESTION: Message = {"role": "user", "content": "⁂q⁑"}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "※x⁜"}}}
_TRIALS: tuple[list[Message], ...] = (
    [_QUESTION, {"role": "assistant", "content": "⁂a⁑"}, _QUESTION, {"role": "assistant", "content": "※b⁜"}],
    [{"role": "system", "content": "s"}, _QUESTION, {"role": "assistant", "content": "⁂a⁑"}],
    [_QUESTION, {"role": "assistant", "content": "<think>\nt\n</think>\n\n⁂a⁑"}, _QUESTION,
     {"role": "assistant", "content": "<think>\nu\n</think>\n\n※b⁜"}],
    [_QUESTION, {"role": "assistant", "content": "⁂a⁑"}, {"role": "assistant", "content": "※b⁜"}],
    [_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}, {"role": "tool", "content": "r"},
     {"role": "assistant", "content": "※b⁜"}],
)  # fmt: skip
_CHECKED_AT_FIRST, _CHECKED_EVERY = 2, 200  # rows that are settled both ways


class AnswerFinder:
    """Finds the answers of conversations that one template writes with one set of options.

    Args: write: ChatTemplate.write. ends: what may end an answer, the longest first; a span ends before it. eos: the
        tokenizer's own end token.
    """

    def __init__(self, write: Callable[..., str], options: Mapping[str, object], ends: Sequence[str], eos: str) -> None:
        self._write, self._options = write, options
        self._ends, self._eos = ends, eos
        self._rows = 0
        self.headers: Headers | None = None

    def find(self, messages: Sequence[Message], tools: Tools | None) -> tuple[str, Found]:
        """The text and its answers. Raises: TemplateError if it cannot be written, or they cannot be settled."""
        text = self._write(messages, tools, False, self._options)
        found = self.headers.find(text, messages) if self.headers is not None else None
        self._rows += 1
        if found is None or self._rows <= _CHECKED_AT_FIRST or self._rows % _CHECKED_EVERY == 0:
            sure = self._surely(text, messages, tools)
            if found is not None and found != sure:
                self.headers = None  # this template is not what the trials showed
            found = sure
        return text, found

    def _surely(self, text: str, messages: Sequence[Message], tools: Tools | None) -> Found:
        finder = _Finder(self._writers(tools), list(messages), text, self._ends, self._eos)
        return [finder.span(i) for i, message in enumerate(messages) if role_of(message) == "assistant"]

    def _writers(self, tools: Tools | None) -> list[Write]:
        plain = {key: value for key, value in self._options.items() if key != "enable_thinking"}
        return [
            lambda part, generation, options=options: self._write(part, tools, generation, options)  # type: ignore[misc]
            for options in ([self._options] if plain == self._options else [self._options, plain])
        ]

    def learn(self) -> Headers | None:
        """What stands around answers, if trials show that it is always the same."""
        writers = self._writers(None)
        settled = []
        for messages in _TRIALS:
            try:
                text = self._write(messages, None, False, self._options)
                settled.append((text, messages, self._surely(text, messages, None)))
            except TemplateError:
                if messages in _TRIALS[:2]:
                    return None
        prompts = [_prompt(write, messages[:1]) for write in writers for _, messages, _ in settled[:1]]
        if not all(prompts) or _prompt(writers[0], _TRIALS[0][:3]) != prompts[0]:
            return None
        header = min(
            (_ending(text[:start], prompts[0]) for text, _, found in settled for start, _, _ in found), key=len
        )
        if not header or not all(prompt.startswith(header) for prompt in prompts):
            return None
        ends: set[str] = set()
        for text, _, found in settled:
            for _, end, _ in found:
                if end < len(text) and not text.startswith(header, end):
                    token = next((token for token in self._ends if text.startswith(token, end)), None)
                    if token is None:
                        return None
                    ends.add(token)
        headers = Headers(header, tuple(prompt[len(header) :] for prompt in prompts), tuple(ends), self._eos)
        tried = [(headers.find(text, messages), found) for text, messages, found in settled]
        return headers if tried[0][0] and all(quick in (None, found) for quick, found in tried) else None


class Headers:
    """Answers between a header and an end token. rests: how generation prompts continue behind the header."""

    def __init__(self, header: str, rests: tuple[str, ...], ends: tuple[str, ...], eos: str) -> None:
        self.header, self.ends = header, ends
        self.eos = eos
        self.rests = sorted(rests, key=len, reverse=True)

    def find(self, text: str, messages: Sequence[Message]) -> Found | None:
        """The answers, None where something in the conversation makes them doubtful."""
        answers = [i for i, message in enumerate(messages) if role_of(message) == "assistant"]
        if text.count(self.header) != len(answers) or self._have_marks(messages):
            return None
        found, at = [], 0
        for place, index in enumerate(answers):
            start = text.index(self.header, at) + len(self.header)
            rest = next((rest for rest in self.rests if text.startswith(rest, start)), None)
            if rest is None:
                if any(text.startswith(rest[:1], start) for rest in self.rests):
                    return None  # a part of what the prompt says
                rest = ""
            start += len(rest)
            at = text.find(self.header, start)
            limit = at if at >= 0 else len(text)
            end = min((e for e in (text.find(end, start, limit) for end in self.ends) if e >= 0), default=limit)
            if end == limit and not (place == len(answers) - 1 and index == len(messages) - 1):
                if at < 0 or answers[place + 1] != index + 1:
                    return None
            if not _holds_answer(text, start, end, messages[index], self.eos):
                return None
            found.append([start, end, index])
            at = start
        return found

    def _have_marks(self, messages: Sequence[Message]) -> bool:
        said = "\n".join(
            f"{message.get('content')}{message.get('reasoning_content', '')}{message.get('tool_calls', '')}"
            for message in messages
        )
        return any(mark in said for mark in (self.header, *self.ends))


def _prompt(write: Write, messages: Sequence[Message]) -> str:
    """What a generation prompt adds to the text; nothing if it does more than add."""
    try:
        before, without = write(messages, True), write(messages, False)
    except TemplateError:
        return ""
    return before[len(without) :] if before.startswith(without) else ""


def _ending(text: str, prompt: str) -> str:
    """The longest beginning of `prompt` that `text` ends with."""
    return next((prompt[:k] for k in range(len(prompt), 0, -1) if text.endswith(prompt[:k])), "")


def _holds_answer(text: str, start: int, end: int, message: Message, eos: str) -> bool:
    content, calls = message.get("content"), message.get("tool_calls")
    wanted = [content.split("</think>")[-1].strip() if isinstance(content, str) else ""]
    if calls:  # some templates leave out the text of an answer with a call
        wanted.append(str(function_of(calls[-1])["name"]))
    elif eos and eos in text[start : max(start, text.find(wanted[0], start, end))]:
        return False  # it lies behind the end of the turn that it should be
    return start <= end and any(part in text[start:end] for part in wanted)


class _Finder:
    """Where the answers lie in `text`, the whole conversation as the first of `writers` gives it.

    A second writer has another generation prompt: with thinking off, the prompt holds an empty thought block, but an
    answer that thinks nevertheless stands behind the other prompt.
    """

    def __init__(
        self, writers: Sequence[Write], messages: list[Message], text: str, stop_words: Sequence[str], eos: str
    ) -> None:
        self.writers, self.messages = writers, messages
        self.text, self.stop_words = text, stop_words
        self.eos = eos
        self._prefixes: dict[tuple[int, bool, int], str | None] = {(len(messages), False, 0): text}

    def span(self, index: int) -> list[int]:
        """[start, end, index] of an assistant message."""
        before, after = self._prefix(index, True), self._prefix(index + 1, False)
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

    def _prefix(self, length: int, generation: bool, writer: int = 0) -> str | None:
        """The first messages as text, written once."""
        key = (length, generation, writer)
        if key not in self._prefixes:
            self._prefixes[key] = self._try(self.messages[:length], generation, writer)
        return self._prefixes[key]

    def _try(self, messages: list[Message], generation: bool, writer: int = 0) -> str | None:
        try:
            return self.writers[writer](messages, generation)
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
        for writer in range(len(self.writers)):
            before, without = self._prefix(index, True, writer), self._prefix(index, False, writer)
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
        if not _holds_answer(self.text, start, end, self.messages[index], self.eos):
            raise self._unsettled(index, "its content is not where it should be")

    def _unsettled(self, index: int, why: str) -> TemplateError:
        return TemplateError(
            f"where message {index} (assistant) stands in the chat template's text cannot be settled: {why}; put "
            "{% generation %} tags into the template, or choose a registered one with --template NAME"
        )
