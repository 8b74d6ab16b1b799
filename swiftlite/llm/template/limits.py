"""What one row may cost: rows that no tokenizer takes, or that are far too long, end as TemplateError before they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from swiftlite.utils.errors import SwiftliteError, TemplateError
from swiftlite.utils.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer texts are refused before they are tokenised, which takes up to 250 bytes a character.
MAX_CHARS = 4_000_000
_CHARS_AT_ONCE = 2_000_000

Span = tuple[int, int, float]  # characters [start, end) of the text and their loss weight


class MaxLengthError(TemplateError):
    """A conversation with more tokens than max_length.

    length: its number of tokens, or at least so many. seen: that in words; of a text that was not even tokenised its
    characters.
    """

    def __init__(self, length: int, max_length: int, chars: int | None = None) -> None:
        self.seen = f"{length} tokens" if chars is None else f"{chars} characters"
        super().__init__(
            f"{self.seen} are more than --max_length {max_length}; raise it, or choose --truncation_strategy delete, left, "
            "right or split"
        )
        self.length, self.max_length = length, max_length
        self.chars = chars

    def __reduce__(self) -> tuple[type[MaxLengthError], tuple[int, int, int | None]]:
        return MaxLengthError, (self.length, self.max_length, self.chars)


def max_token_chars(tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of a text that one token may stand for.

    Tokens are as long as they are stored: byte-level ones have one character a byte, others a mark for a blank. A
    normaliser may shorten the text first, in Unicode's composition to a third at the most.
    """
    vocab: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return 3 * max(16, *map(len, vocab)) if vocab else MAX_CHARS


def bounded_text(
    text: str, spans: list[Span], max_length: int | None, chars_per_token: int, strategy: str
) -> tuple[str, list[Span]]:
    """A training text and its spans, cut to what the truncation strategy can need of it.

    Raises: MaxLengthError for a text that certainly has more tokens; TemplateError above MAX_CHARS.
    """
    room = None if max_length is None else (max_length + 1) * chars_per_token
    if room is not None and max_length is not None and len(text) > room:
        if strategy in ("raise", "delete"):
            raise MaxLengthError(max_length + 1, max_length, len(text))
        if strategy == "right":
            return text[:room], [(start, min(end, room), weight) for start, end, weight in spans if start < room]
        if strategy == "left":
            cut = len(text) - room
            return text[cut:], [(max(start - cut, 0), end - cut, weight) for start, end, weight in spans if end > cut]
    check_length(text)
    return text, spans


def check_length(text: str) -> None:
    """Raises: TemplateError for a text of more than MAX_CHARS characters."""
    if len(text) > MAX_CHARS:
        raise TemplateError(f"{len(text):,} characters are more than {MAX_CHARS:,}; divide the row")


def check_characters(text: str) -> None:
    """Raises: TemplateError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"character {error.start} is half of a surrogate pair ({ascii(text[error.start])}), which no text holds; "
            "fix the row"
        ) from None


@contextmanager
def told_as_template_error() -> Iterator[None]:
    """Values of a type that no layout expects cost their row, not the run."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise TemplateError(f"the template cannot write it ({type(error).__name__}: {one_line(error)})") from None
    except ValueError as error:
        if isinstance(error, SwiftliteError):
            raise
        raise TemplateError(f"the template cannot write it ({one_line(error)})") from None


def in_parts(scripts: Sequence[tuple[str, list[Span]]]) -> Iterator[list[tuple[str, list[Span]]]]:
    """Texts in groups that need not much memory at once."""
    part: list[tuple[str, list[Span]]] = []
    chars = 0
    for script in scripts:
        if part and chars + len(script[0]) > _CHARS_AT_ONCE:
            yield part
            part, chars = [], 0
        part.append(script)
        chars += len(script[0])
    if part:
        yield part
