"""Spans of a text in tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

from swiftlite.llm.template.limits import Span

if TYPE_CHECKING:
    from tokenizers import Encoding


def token_spans(encoding: Encoding, count: int, spans: Iterable[Span]) -> Iterable[Span]:
    """Spans in tokens: a token belongs to the span it shares a character with.

    A token reaches from the end of the one before it to its own end: byte-level tokenizers leave leading blanks out of
    offsets, and give every piece of a character that is split over tokens the whole character. Offsets are asked for one
    by one: lists of all of them take longer than the rest.
    """

    def chars_of(index: int) -> tuple[int, int]:
        return encoding.token_to_chars(index) or (0, 0)

    def end_of(index: int) -> int:
        return chars_of(index)[1]

    def token_at(position: int) -> int:
        """The first token that ends after a character: that of the character, if it is in one."""
        token = encoding.char_to_token(position) if position >= 0 else None
        return bisect_right(range(count), position, key=end_of) if token is None else token

    for start, end, weight in spans:
        first = token_at(start)
        last = max(first, token_at(end - 1))
        while last < count and (last == 0 or min(chars_of(last)[0], end_of(last - 1)) < end):
            last += 1
        yield first, last, weight
