"""Arguments of `swiftlite port`."""

from __future__ import annotations

from typing import ClassVar

from swiftlite.arguments.parser import Arguments, arguments, field
from swiftlite.utils.errors import UsageError


@arguments
class PortArguments(Arguments):
    """Port: what a script's `swift` and `megatron` commands come to here; nothing of it is run"""

    POSITIONAL: ClassVar[str | None] = "script"

    script: list[str] = field([], "shell script file", path=True)
    debug: bool = field(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.script) != 1:
            raise UsageError(f"port reads one script, {len(self.script)} given: swiftlite port SCRIPT.sh")
