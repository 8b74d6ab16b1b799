"""Text from files on its way to a terminal: nothing in it acts there, and no name fills the screen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_WORD, MAX_TEXT = 400, 4000
_WORD = rf"\S{{{MAX_WORD + 1},}}"


def printable(text: str) -> str:
    """`text` with control characters escaped (line ends and tabs stay), very long words and texts cut in the middle."""
    if len(text) > MAX_WORD:
        text = re.sub(_WORD, lambda match: _cut(match[0], MAX_WORD), text[: 1 << 20])
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in _cut(text, MAX_TEXT)
    )


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def format_seconds(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def some(names: Iterable[str], count: int = 8) -> str:
    """The first names of a list that may be long, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:count]) + (f" and {len(listed) - count} more" if len(listed) > count else "")


def listing(what: str, names: Sequence[str], count: int = 5) -> str:
    """`2 missing tensors: a, b`, nothing without names. what: `missing`."""
    return f"{len(names)} {what} tensor{'s' if len(names) > 1 else ''}: {some(names, count)}" if names else ""


def short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says; its type where it says nothing. Of the system's errors not their number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """`; did you mean --a or --b?`, or nothing if no known name is close."""
    import difflib  # of a mistake only

    spelled = {item.lstrip("-"): item for item in sorted(known)}
    close = [spelled[n] for n in difflib.get_close_matches(name.lstrip("-"), spelled, n=count, cutoff=0.75)]
    return f"; did you mean {' or '.join(close)}?" if close else ""
