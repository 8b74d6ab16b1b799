"""Arguments of `swiftlite completion`."""

from __future__ import annotations

from typing import ClassVar

from swiftlite.arguments.parser import Arguments, arguments, field
from swiftlite.utils.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@arguments
class CompletionArguments(Arguments):
    """Completion: a script that lets a shell complete commands, flags and their values"""

    POSITIONAL: ClassVar[str | None] = "shell"

    shell: list[str] = field([], f"one of {', '.join(SHELLS)}")
    debug: bool = field(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.shell) != 1 or self.shell[0] not in SHELLS:
            raise UsageError(
                f"completion {' '.join(self.shell) or '(nothing)'}: name your shell, one of {', '.join(SHELLS)}"
            )
