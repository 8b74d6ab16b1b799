"""Template: a conversation as text, as token ids with labels, and as padded batches.

The text is a chat template's: the checkpoint's own, or a registered one (jinja.py), together with the spans the model is
to learn. The whole text is tokenised at once, so that ids always equal those of the rendered text; labels are found by
offsets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

from swiftlite.families.records import TemplateMeta
from swiftlite.llm.template.agent import AGENT_FORMATS, as_plain
from swiftlite.llm.template.collate import IGNORE_INDEX, join_rows, pad_rows
from swiftlite.llm.template.jinja import ChatTemplate, RowWriter
from swiftlite.llm.template.limits import (
    MaxLengthError,
    Span,
    bounded_text,
    check_characters,
    check_length,
    in_parts,
    max_token_chars,
    told_as_template_error,
)
from swiftlite.llm.template.loss_scale import parse_loss_scale, weigh
from swiftlite.llm.template.messages import Message, Tools, role_of, with_arguments
from swiftlite.llm.template.options import TemplateOptions
from swiftlite.llm.template.registered import source_of
from swiftlite.llm.template.token_spans import token_spans
from swiftlite.llm.template.traits import Traits, traits_of
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.logger import warn_once
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Special tokens of some tokenizers that stand inside answers, so that none of them ends one.
_TAGS = {f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")}
# How templates mark an answer without thoughts.
_EMPTY_THOUGHTS = ("<think>\n\n</think>\n\n", "\n<think></think>")

Encoded = Json
Outcome = Encoded | list[Encoded] | TemplateError  # of one row
Script = tuple[str, list[Span]] | TemplateError  # a row's text and its spans with loss


class Template(TemplateOptions):
    """How one model's conversations are written. Made by `get_template`."""

    def __init__(self, meta: TemplateMeta, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        super().__init__(**options)
        self.meta, self.tokenizer = meta, tokenizer
        agent_template = self.agent_template
        self.agent_template = agent_template or meta.agent_template
        self.loss_scale, self.weights = parse_loss_scale(self.loss_scale)
        if self.template_backend == "auto":
            self.template_backend = "jinja" if getattr(tokenizer, "chat_template", None) else "swift"
        self.special_tokens = _special_tokens(tokenizer)
        self.chat = self._chat_template()
        self._plain_tools = self._writes_plain_tools(agent_template)

    def _chat_template(self) -> ChatTemplate:
        meta, source = self.meta, None
        name = "the checkpoint's chat template"
        if self.template_backend == "swift":
            own_bos = self._own_bos() if meta.auto_add_bos and not meta.jinja else ""
            source, name = source_of(meta, own_bos), f"template {meta.template_type!r}"
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} - _TAGS
        known = {*meta.stop_words, self._suffix.strip(), self.special_tokens.get("eos_token", "")}
        return ChatTemplate(self.tokenizer, source, name, self.special_tokens, _longest_first(known | special))

    def _writes_plain_tools(self, agent_template: str | None) -> bool:
        """Whether tools are to be written as text, by a template that has no words for them."""
        if agent_template in (None, self.meta.agent_template):
            return agent_template in AGENT_FORMATS and not (self.chat.prints_tools() or self.chat.prints_calls())
        if self.chat.prints_tools() or self.chat.prints_calls():
            raise UsageError(
                f"--agent_template {agent_template!r}: {self.chat.name} writes tools as its model's own chat template does "
                f"({self.meta.agent_template!r}); leave the flag out"
            )
        if agent_template not in AGENT_FORMATS:
            raise UsageError(
                f"--agent_template {agent_template!r}: {self.chat.name} can write tools as {', '.join(AGENT_FORMATS)}"
            )
        return True

    @property
    def _suffix(self) -> str:
        """What the record of a registered template says ends the last answer."""
        parts = (part if isinstance(part, str) else "".join(self.special_tokens.get(n.removesuffix("_id"), "") for n in part)
                 for part in self.meta.suffix)  # fmt: skip
        return "".join(parts)

    @cached_property
    def traits(self) -> Traits:
        return self.chat.bounded(lambda: traits_of(self.chat, self._options({})))

    @cached_property
    def suffix(self) -> str:
        """What ends a last answer where the text does not. Plain text ends as the tokenizer's texts do."""
        eos = self.special_tokens.get("eos_token", "")
        if not self.use_chat_template:
            return eos
        return self.traits.end or (self._suffix if self.template_backend == "swift" else eos)

    @cached_property
    def stop_words(self) -> tuple[str, ...]:
        """What ends a generated answer, the longest first, so that a stop that begins with another one is found whole."""
        own = () if not self.use_chat_template else (self.traits.end, self.traits.call_end, *self.meta.stop_words)
        return _longest_first({*own, self.suffix.strip(), self.special_tokens.get("eos_token", "")})

    @property
    def template_type(self) -> str:
        return self.meta.template_type

    @property
    def pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int((self.tokenizer.eos_token_id or 0) if pad is None else pad)

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids of the tokens that end a generated answer, ascending. A stop word of several tokens is not among them."""
        ids = {ids[0] for ids in map(self.tokenize, self.stop_words) if len(ids) == 1}
        if self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return sorted(ids)

    # -- text ---------------------------------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = False,
        **kwargs: object,
    ) -> str:
        """The conversation as text, equal to the model's official chat template.

        Args:
            messages: dicts with `role` and `content`; assistants may have `tool_calls` and `reasoning_content`.
            tools: JSON schemas of the functions on offer.
            add_generation_prompt: end with what opens the assistant's turn.
            kwargs: what the official template takes besides, such as `enable_thinking` or `date_string`.
        Raises: TemplateError where the official template cannot write the conversation.
        """
        return self.chat.bounded(lambda: self._written(messages, tools, add_generation_prompt, kwargs))

    def _written(self, messages: Sequence[Message], tools: Tools | None, generation: bool, kwargs: Json) -> str:
        if not self.use_chat_template:
            return _contents(messages)
        whole, tools, _ = self._prepared(messages, tools)
        return self.chat.write(whole, tools, generation, self._options(kwargs))

    def encode_prompt(self, messages: Sequence[Message], tools: Tools | None = None, **kwargs: object) -> list[int]:
        """Token ids of the conversation up to where the model answers, for generation."""
        if not self.use_chat_template:
            return self.tokenize(_contents(messages))
        with told_as_template_error():
            text = self.render(self._with_arguments(messages), tools, add_generation_prompt=True, **kwargs)
        check_length(text)
        if self.response_prefix is not None:
            text = text.removesuffix(self.traits.opening) + self.response_prefix
        return self.tokenize(text)

    @property
    def answer_prefix(self) -> str:
        """What the prompt already says of the answer, such as the opening of a thought."""
        return self.traits.opening if self.response_prefix is None else self.response_prefix

    def parse_response(self, text: str) -> Message:
        """The assistant message for a generated text, to be put into the history of a chat."""
        return {"role": "assistant", "content": text}

    # -- tokens -------------------------------------------------------------------------------------------------

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are written out; nothing is added.

        Raises: TemplateError for half of a surrogate pair, which is not a character.
        """
        check_characters(text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(encoded["input_ids"])

    def encode(self, row: Json) -> Json:
        """One conversation for training.

        Args: row: {"messages": [...], "tools": [...] or absent}. A message may carry `loss` (bool) or `loss_scale`
            (float), which replace its weight.
        Returns: input_ids and labels, lists of one length [S]; labels are not shifted and -100 where there is no loss;
            length = S; loss_scale [S] floats only where a weight is neither 0 nor 1. The text is `render(...)` plus the
            template's stop token where the official template prints none after the last answer. Labels cover what the
            model itself writes in an assistant's turn, and the first end token after it; all are -100 where no
            assistant's text has a loss.
        Raises: TemplateError where the conversation cannot be written; MaxLengthError.
        """
        encoded = self.encode_batch([row])[0]
        if isinstance(encoded, TemplateError):
            raise encoded
        if isinstance(encoded, list):
            raise MaxLengthError(sum(part["length"] for part in encoded), self.max_length or 0)
        return encoded

    def encode_batch(self, rows: Sequence[Json], writer: RowWriter[Script] | None = None) -> list[Outcome]:
        """`encode` of many rows with one call of the tokenizer (which uses all cores). Errors take a row's place.

        Args: writer: `self.writer()`, for many batches. With truncation_strategy 'split', a row that is too long becomes a
            list of samples.
        """
        if writer is None:
            with closing(self.writer()) as writer:
                return self.encode_batch(rows, writer)
        encoded: list[Outcome] = []
        for scripts in writer(rows):
            tokenized = iter(self._tokenize_batch([s for s in scripts if not isinstance(s, TemplateError)]))
            for script in scripts:
                row = rows[len(encoded)]
                try:
                    encoded.append(script if isinstance(script, TemplateError) else self._finish(row, *next(tokenized)))
                except TemplateError as error:
                    encoded.append(error)
        return encoded

    def writer(self) -> RowWriter[Script]:
        """What writes the training text of rows, as far as it can be needed; errors take a row's place.

        Later changes of this template do not reach it. `close` ends it.
        """
        limits = (self.max_length, self._max_token_chars, self.truncation_strategy)

        def script(row: Json) -> Script:
            try:
                with told_as_template_error():
                    text, spans = self._training_text(row)
                check_characters(text)
                return bounded_text(text, spans, *limits)
            except TemplateError as error:
                return error

        if self.use_chat_template:
            self._learn()
        return RowWriter(script, is_bounded=self.use_chat_template and self.chat.is_own, name=self.chat.name)

    def training_text(self, row: Json) -> tuple[str, list[Span]]:
        """The text of a training row and its spans with loss: (start, end, weight), ascending, in characters.

        Raises: TemplateError where the conversation cannot be written, also within bounds.
        """
        if not self.use_chat_template:
            return self._training_text(row)
        self._learn()
        return self.chat.bounded(lambda: self._training_text(row))

    def _learn(self) -> None:
        """Know what trials of the chat template show before a child needs it."""
        if "traits" not in self.__dict__:
            _ = self.suffix, self.traits
            self.chat.learn(self._options({}))

    def _training_text(self, row: Json) -> tuple[str, list[Span]]:
        messages, tools = row.get("messages"), row.get("tools")
        if not isinstance(messages, (list, tuple)) or not messages:
            raise TemplateError("a row has no messages; give 'messages': [{'role': ..., 'content': ...}, ...]")
        if isinstance(tools, str):
            tools = _parse_tools(tools)
        if self.pooled and role_of(messages[-1]) != "assistant":
            return self._written(self._with_arguments(messages), tools, True, {}), []
        text, spans = self._plain_text(messages) if not self.use_chat_template else self._chat_text(messages, tools)
        stopped, holds_ends = False, self.use_chat_template and self.chat.is_tagged(tools)
        for span in spans:
            stopped = holds_ends and text[span[0] : span[1]].rstrip().endswith(self.chat.ends)
            stop = "" if stopped else self.chat.end_at(text, span[1])
            span[1] += len(stop)
            stopped = stopped or bool(stop)
        if spans and not stopped and role_of(messages[-1]) == "assistant" and spans[-1][1] == len(text):
            calls = self.use_chat_template and messages[-1].get("tool_calls")
            text += self.traits.call_end or self.suffix if calls else self.suffix
            spans[-1][1] = len(text)
        if self.loss_scale == "all" and not self.pooled:
            return text, list(weigh(text, 0, len(text), 1.0, self.weights))
        return text, [] if self.pooled else list(self._weighted(text, spans, messages))

    def _plain_text(self, messages: Sequence[Message]) -> tuple[str, list[list[int]]]:
        """Contents end to end."""
        text, spans = "", []
        for i, message in enumerate(messages):
            start, text = len(text), text + str(message.get("content") or "")
            if role_of(message) == "assistant":
                spans.append([start, len(text), i])
        return text, spans

    def _chat_text(self, messages: Sequence[Message], tools: Tools | None) -> tuple[str, list[list[int]]]:
        """Text by the chat template, and [start, end, index of the message] of what assistants wrote."""
        self._warn_of_lost_tools(messages, tools)
        whole, tools, origin = self._prepared(self._with_arguments(messages), tools)
        text, spans = self.chat.write_answers(whole, tools, self._options({}))
        spans = [[start, end, origin[index]] for start, end, index in spans]
        return (text, spans) if self.add_non_thinking_prefix else _without_empty_thoughts(text, spans, messages)

    def _with_arguments(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not any(message.get("tool_calls") for message in messages) or self.traits.arguments is None:
            return messages
        return with_arguments(messages, self.traits.arguments)

    def _weighted(self, text: str, spans: Iterable[list[int]], messages: Sequence[Message]) -> Iterable[Span]:
        roles = [role_of(message) for message in messages]
        last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
        for start, end, index in spans:
            message = messages[index]
            weight = 0.0 if self.loss_scale == "last_round" and index < last_user else 1.0
            if message.get("loss") is not None:
                weight = float(message["loss"])
            if message.get("loss_scale") is not None:
                weight = float(message["loss_scale"])
            if weight and not self.weights and start < end:
                yield start, end, weight
            elif weight:
                yield from weigh(text, start, end, weight, self.weights)

    def _prepared(
        self, messages: Sequence[Message], tools: Tools | None
    ) -> tuple[list[Message], Tools | None, list[int]]:
        """What the chat template is given, and for each message the index of the one it comes from (-1: none)."""
        whole = list(messages)
        if self.default_system and (not messages or role_of(messages[0]) != "system"):
            whole = [{"role": "system", "content": self.default_system}, *whole]
        origin = [i - (len(whole) - len(messages)) for i in range(len(whole))]
        if self._plain_tools:
            whole, sources = as_plain(whole, tools)
            tools, origin = None, [origin[i] if i >= 0 else -1 for i in sources]
        return whole, tools, origin

    def _own_bos(self) -> str:
        """What the tokenizer itself puts in front of a text."""
        with_specials, plain = self.tokenizer("a")["input_ids"], self.tokenize("a")
        return str(self.tokenizer.decode(with_specials[: with_specials.index(plain[0])]))

    def _options(self, kwargs: Json) -> Json:
        own: Json = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        if self.default_system == "" and self.template_backend == "swift":  # not the template's either
            own["default_system"] = ""
        return {**own, **kwargs}

    def _warn_of_lost_tools(self, messages: Sequence[Message], tools: Tools | None) -> None:
        if self._plain_tools:
            return
        if tools and not self.chat.prints_tools():
            warn_once(f"{self.chat.name} does not write the list of tools (its model's chat template has none)")
        if not self.chat.prints_calls() and any(message.get("tool_calls") for message in messages):
            warn_once(f"{self.chat.name} does not write tool calls (its model's chat template has none)")

    def _take_whole_texts(self, backend: Tokenizer) -> None:
        """Set nothing that is so already: older tokenizers refuse it while another thread uses them."""
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        split = bool(getattr(self.tokenizer, "split_special_tokens", False))
        if backend.encode_special_tokens != split:
            backend.encode_special_tokens = split

    def _tokenize_batch(self, scripts: Sequence[tuple[str, list[Span]]]) -> Iterable[tuple[list[int], list[Span]]]:
        """Ids of each text, and its spans in tokens."""
        if not scripts:
            return
        if getattr(self.tokenizer, "is_fast", False):
            # What the tokenizer asks, without its lists of all that is known.
            backend = self.tokenizer.backend_tokenizer
            self._take_whole_texts(backend)
            for part in in_parts(scripts):
                encodings = backend.encode_batch([text for text, _ in part], add_special_tokens=False)
                for (_, spans), encoding in zip(part, encodings, strict=True):
                    ids = encoding.ids
                    yield ids, list(token_spans(encoding, len(ids), spans))
        else:
            # Without offsets: a boundary lies where the ids of the text before it stop agreeing. Blanks of the header
            # that are tokenised differently once text follows are then trained on too.
            for text, spans in scripts:
                ids = self.tokenize(text)
                found = []
                for start, end, weight in spans:
                    first, last = (_common_prefix(ids, self.tokenize(text[:at])) for at in (start, end))
                    found.append((first, last, weight))
                yield ids, found

    @cached_property
    def _max_token_chars(self) -> int:
        return max_token_chars(self.tokenizer)

    def _finish(self, row: Json, ids: list[int], spans: list[Span]) -> Encoded | list[Encoded]:
        if self.max_length is not None and len(ids) > self.max_length:
            if self.truncation_strategy in ("raise", "delete"):
                raise MaxLengthError(len(ids), self.max_length)
            if self.truncation_strategy == "split":
                cuts = (slice(start, start + self.max_length) for start in range(0, len(ids), self.max_length))
                return [self._sample(row, ids, spans, cut) for cut in cuts]
            cut = slice(self.max_length) if self.truncation_strategy == "right" else slice(-self.max_length, None)
            return self._sample(row, ids, spans, cut)
        return self._sample(row, ids, spans)

    def _sample(self, row: Json, ids: list[int], spans: list[Span], cut: slice | None = None) -> Encoded:
        labels = [IGNORE_INDEX] * len(ids)
        weights = [0.0] * len(ids) if any(weight != 1.0 for _, _, weight in spans) else None
        for first, last, weight in spans:
            labels[first:last] = ids[first:last]
            if weights is not None:
                weights[first:last] = [weight] * (last - first)
        if cut is not None:
            ids = ids[cut]
            labels = labels[cut]
            weights = weights and weights[cut]
        encoded: Json = {"input_ids": ids, "labels": labels, "length": len(ids)}
        if weights is not None and any(weight not in (0.0, 1.0) for weight in weights):
            encoded["loss_scale"] = weights
        if self.pooled and "label" in row:
            encoded["label"] = row["label"]
        if not self.remove_unused_columns:
            encoded.update({key: value for key, value in row.items() if key not in ("messages", "tools", *encoded)})
        return encoded

    # -- batches ------------------------------------------------------------------------------------------------

    def data_collator(
        self, batch: Sequence[Json], pad_to_multiple_of: int | None = None, pad_to: int | None = None
    ) -> dict[str, Tensor]:
        """Pad encoded rows to one length and stack them.

        Args: pad_to_multiple_of: round the length up; sequence_parallel_size does so by itself. pad_to: at least this.
        Returns: int64 tensors [B, S]: input_ids, labels (-100 in the padding and for a row's first token, which nothing
            predicts), attention_mask (1 text, 0 padding),
            position_ids (0.. per row, 0 in the padding); loss_scale float32 [B, S] where a row has one. With
            padding_free the rows are joined to [1, S], position_ids start anew in each and there is no mask.
        """
        if self.padding_free:
            batch = [join_rows(batch)]
        multiple = (pad_to_multiple_of or 1) * max(1, self.sequence_parallel_size)
        tensors = pad_rows(batch, self.pad_token_id, multiple, pad_to or 0, self.padding_side)
        if self.padding_free:
            del tensors["attention_mask"]
        return tensors


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    tokens = {name: getattr(tokenizer, name, None) for name in _SPECIAL_TOKENS}
    return {name: str(token) for name, token in tokens.items() if token is not None}


def _longest_first(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({word for word in words if word}, key=lambda word: (-len(word), word)))


def _contents(messages: Sequence[Message]) -> str:
    return "".join(str(message.get("content") or "") for message in messages)


def _without_empty_thoughts(
    text: str, spans: Iterable[list[int]], messages: Sequence[Message]
) -> tuple[str, list[list[int]]]:
    """The text without the empty thought blocks that a template writes before answers without thoughts."""
    kept, removed = [], 0
    for start, end, index in spans:
        start, end = start - removed, end - removed
        mark = next((mark for mark in _EMPTY_THOUGHTS if text.startswith(mark, start)), "")
        if not _has_thoughts(messages[index]):
            text, removed = text[:start] + text[start + len(mark) :], removed + len(mark)
            end -= len(mark)
        kept.append([start, end, index])
    return text, kept


def _has_thoughts(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "<think>" in str(message.get("content"))


def _parse_tools(text: str) -> Tools | None:
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise TemplateError(f"'tools' is a string but not JSON ({error}); give a list of function schemas") from None
    return tools if isinstance(tools, list) or tools is None else [tools]


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
