"""Running what a downloaded file says within bounds: in a child process with limits on time and memory."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from swiftlite.utils.errors import SwiftliteError

T = TypeVar("T")

SECONDS = 2.0  # of processor time
_MEMORY_BYTES = 2**30  # beside what the process has already
_RESULT_BYTES = 2**28
# The child computes all the time, so this is reached only where it waits for something that never comes.
_PATIENCE = 30.0


class LimitError(Exception):
    """The child took too much time, memory or room."""


def run_bounded(function: Callable[[], T], seconds: float = SECONDS) -> T:
    """`function()` in a child process (a fork: it sees everything and changes nothing here).

    Args: seconds: processor time that it may take. The result travels by pickle.
    Raises: SwiftliteError as `function` does; LimitError where it does not end in time, needs more than 1 GiB, or ends in
        any other way.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads. The child runs plain Python and takes none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(function, writer, seconds)
    os.close(writer)
    try:
        payload = _read(reader, time.monotonic() + _PATIENCE * max(1.0, seconds))
    finally:
        os.close(reader)
        _end(child)
    if not payload:
        raise LimitError(f"it takes more than {seconds:g} s or {_MEMORY_BYTES // 2**30} GiB")
    is_result, value = pickle.loads(payload)
    if is_result:
        return value  # type: ignore[no-any-return]
    raise value if isinstance(value, SwiftliteError) else LimitError(value)


def _run_child(function: Callable[[], Any], writer: int, seconds: float) -> None:
    """Never returns: nothing of the parent's clean-up may run here."""
    try:
        _limit(seconds)
        try:
            payload = pickle.dumps((True, function()))
        except SwiftliteError as error:
            payload = pickle.dumps((False, error))
        except Exception as error:  # whatever it is: the parent says it in one line
            payload = pickle.dumps((False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
        while payload:
            payload = payload[os.write(writer, payload) :]
    finally:
        os._exit(0)


def _limit(seconds: float) -> None:
    for name in (signal.SIGPROF, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _read(reader: int, deadline: float) -> bytes:
    """All that the child writes; nothing if it is too much or comes too late."""
    parts: list[bytes] = []
    size = 0
    while size <= _RESULT_BYTES:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(reader, 2**20) if ready else None
        if part is None:
            return b""
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    return b""


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
