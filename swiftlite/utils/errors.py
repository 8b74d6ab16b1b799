"""The errors that users see. One line each: what was seen, what is allowed, what to do next.

Commands print them without a traceback (unless `--debug true`); `UsageError` ends with exit code 2, the rest with 1.
"""

from __future__ import annotations

import re

from swiftlite.utils.text import one_line


class SwiftliteError(ValueError):
    """A mistake in the input that the user can fix. `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(SwiftliteError):
    """A wrong flag, value or combination of flags."""

    exit_code = 2


class ConfigError(SwiftliteError):
    """A model config that cannot be expressed, or that contradicts itself."""


class MapError(SwiftliteError):
    """Tensor names that are unknown, missing or claimed twice."""


class ShapeError(SwiftliteError):
    """A tensor whose shape or dtype is not what the config says."""


class CheckpointError(SwiftliteError):
    """A checkpoint that is missing, truncated, corrupt or of the other format."""


class BudgetError(SwiftliteError):
    """A memory or disk budget that the plan cannot meet."""


class UncheckedError(SwiftliteError):
    """The work is done, a check of it could not run. What was written is kept under its temporary name."""


class TemplateError(SwiftliteError):
    """A conversation that the chat template cannot express."""


class DatasetError(SwiftliteError):
    """A dataset that cannot be read or used."""


class VerifyError(SwiftliteError):
    """Two models that should agree do not."""


_CODE = r"(?i)unsupported global:?(?: GLOBAL)? ([\w.]+)"


def reason(error: BaseException) -> str:
    """What a library's error says, on one line; of a pickle that was refused, what it asked for.

    torch would advise to read such a file with its guard off, and transformers 4 has words of its own for any failure.
    """
    cause = None if isinstance(error, SwiftliteError) else error  # our own say all there is to say
    while cause is not None:
        code = re.search(_CODE, " ".join(str(cause).split()))
        if code:
            return f"refers to {code[1]}, which is code, not data; refusing to load it"
        cause = cause.__cause__ or cause.__context__
    return one_line(error, 300)
