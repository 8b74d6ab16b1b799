"""Arguments of `swiftlite env`."""

from __future__ import annotations

from swiftlite.arguments.parser import Arguments, arguments, field


@arguments
class EnvArguments(Arguments):
    """Environment: what is installed, what a run here uses and why, what is missing for which command"""

    json: bool = field(False, "one JSON object, for bug reports")
    debug: bool = field(False, "show the traceback of an error")
