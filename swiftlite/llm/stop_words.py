"""Text that ends an answer, found in pieces as they come."""

from __future__ import annotations

from collections.abc import Sequence


class StopWords:
    """Lets the pieces of an answer through up to the first stop word; what may be the beginning of one is held back."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words
        self._held = max(map(len, words), default=1) - 1
        self._text, self._shown = "", 0
        self.ended = False

    def find(self, text: str, start: int = 0) -> int:
        """Where the first stop word begins, from `start` on; -1: nowhere."""
        return min((at for word in self.words if (at := text.find(word, start)) >= 0), default=-1)

    def cut(self, text: str) -> str:
        """A whole answer without what its last token wrote beyond its end."""
        end = self.find(text)
        return text if end < 0 else text[:end]

    def feed(self, piece: str) -> str:
        """What can be shown after this piece; `ended` when a stop word has come."""
        if self.ended:
            return ""
        self._text += piece
        end = self.find(self._text, self._shown)
        self.ended = end >= 0
        return self._show(end if self.ended else len(self._text) - self._held)

    def rest(self) -> str:
        """What was held back, when nothing follows."""
        return "" if self.ended else self._show(len(self._text))

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]
