"""Access tokens stay out of what is printed, logged and written: known by the setting, the environment, or their form."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from swiftlite.utils.types import Json

SETTINGS = frozenset({"hub_token", "api_key"})
_VARIABLES = r"(TOKEN|API_KEY|SECRET|PASSWORD)$"
_SHORTEST = 8  # characters; shorter values are words, not secrets
_FORMS = (
    r"\bhf_[A-Za-z0-9]{16,}"
    r"|\bms-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password in an address
)
_told: set[str] = set()


def without_secrets(settings: Mapping[str, object]) -> Json:
    """Settings by name, without those that hold secrets; others may have one in an address."""
    return {name: redacted(value) for name, value in settings.items() if name not in SETTINGS}


def redacted(value: object) -> object:
    """A value as it may be written: see redact, for the texts in it."""
    if isinstance(value, Mapping):
        return {key: redacted(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(entry) for entry in value]
    return redact(value) if isinstance(value, str) else value


def remember(value: str | None) -> None:
    """A secret of this process, to be hidden from now on."""
    if value and len(value) >= _SHORTEST:
        _told.add(value)


def remember_words(words: Sequence[str]) -> None:
    """The secrets among words as typed, before anything is parsed that might fail."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") in SETTINGS:
            remember(value if equals else following)


def redact(text: str) -> str:
    """`text` with *** for every secret."""
    variables = {value for name, value in os.environ.items() if re.search(_VARIABLES, name) and len(value) >= _SHORTEST}
    for value in sorted(_told | variables, key=len, reverse=True):
        text = text.replace(value, "***")
    return re.sub(_FORMS, "***", text)
