"""Running what a downloaded file says within bounds: in a child process with limits on time and memory."""

from __future__ import annotations

import os
import pickle
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from swiftlite.utils.errors import SwiftliteError
from swiftlite.utils.text import one_line

T = TypeVar("T")

SECONDS = 2.0  # of processor time
_MEMORY_BYTES = 2**30  # on top of what the process has already
_RESULT_BYTES = 2**28
_SIZE_BYTES = 8
# The child computes all the time, so this is reached only where it waits for something that never comes.
_PATIENCE = 30.0


class LimitError(Exception):
    """The child took too much time, memory or room."""


def run_bounded(function: Callable[[], T], seconds: float | None = None) -> T:
    """`function()` in a child process (a fork: it sees everything and changes nothing here).

    Args: seconds: processor time that it may take, default SECONDS. The result travels by pickle.
    Raises: SwiftliteError as `function` does; LimitError where it does not end in time, needs more than 1 GiB, or ends in
        any other way.
    """
    (result,) = run_each_bounded([function], seconds)
    return result


def run_each_bounded(functions: Sequence[Callable[[], T]], seconds: float | None = None) -> Iterator[T]:
    """The results of several functions, as run_bounded, from one child: it continues while the caller uses a result.

    Raises: as run_bounded, at the function to blame; those after it are not run.
    """
    limit = SECONDS if seconds is None else seconds
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads. The child runs plain Python and takes none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(functions, writer, limit)
    os.close(writer)
    try:
        for _ in functions:
            deadline = time.monotonic() + _PATIENCE * max(1.0, limit)
            size = int.from_bytes(_read(reader, _SIZE_BYTES, deadline), "big")
            payload = _read(reader, size, deadline) if 0 < size <= _RESULT_BYTES else b""
            if not payload:
                raise LimitError(f"it takes more than {limit:g} s or {_MEMORY_BYTES // 2**30} GiB")
            is_result, value = pickle.loads(payload)
            if not is_result:
                raise value if isinstance(value, SwiftliteError) else LimitError(value)
            yield value
    finally:
        os.close(reader)
        _end(child)


def _run_child(functions: Iterable[Callable[[], object]], writer: int, seconds: float) -> None:
    """Never returns: nothing of the parent's clean-up may run here."""
    try:
        _limit(seconds)
        for function in functions:
            try:
                payload = pickle.dumps((True, function()))
            except SwiftliteError as error:
                payload = pickle.dumps((False, error))
            except Exception as error:  # whatever it is: the parent says it in one line
                payload = pickle.dumps((False, f"{type(error).__name__}: {one_line(error)}"))
            payload = len(payload).to_bytes(_SIZE_BYTES, "big") + payload
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


def _read(reader: int, size: int, deadline: float) -> bytes:
    """The next `size` bytes that the child writes; nothing if it ends before, or they come too late."""
    found = bytearray()
    while len(found) < size:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(reader, min(size - len(found), 2**20)) if ready else b""
        if not part:
            return b""
        found += part
    return bytes(found)


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
