"""Running what a downloaded file says within bounds: in a child process with limits on time and memory."""

from __future__ import annotations

import gc
import os
import pickle
import resource
import select
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

from swiftlite.utils.errors import SwiftliteError
from swiftlite.utils.text import one_line

T = TypeVar("T")
Q = TypeVar("Q")

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
    child = BoundedChild[None, T](lambda _: function())
    try:
        return next(child.ask([None], seconds))
    finally:
        child.end()


class BoundedChild(Generic[Q, T]):
    """A child process that answers requests by one function, each within bounds, as run_bounded.

    It is a fork, of what this process is now. Many requests cost it less than a fork each. It ends with `end`, with the
    object, with this process, and by a request that is out of bounds.
    """

    def __init__(self, function: Callable[[Q], T]) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns where there are threads. The child runs plain Python and takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _run_child(function, requests, answers)
        os.close(requests)
        os.close(answers)
        self._left = 0  # answers that nobody has taken
        self.end = weakref.finalize(self, _end, os.getpid(), child, (self._requests, self._answers))

    @property
    def is_ready(self) -> bool:
        return self.end.alive and not self._left

    def ask(self, requests: Sequence[Q], seconds: float | None = None) -> Iterator[T]:
        """The answers in order; the child continues while the caller uses one.

        Args: seconds: as run_bounded, for each request.
        Raises: as run_bounded, at the request to blame. The child is gone then, and also where not all answers are taken:
            what is left of them must not answer other requests.
        """
        limit = SECONDS if seconds is None else seconds
        self._left = len(requests)
        try:
            for request in requests:  # it always reads, so this does not wait for it
                _write(self._requests, (limit, request))
            for _ in requests:
                deadline = time.monotonic() + _PATIENCE * max(1.0, limit)
                size = int.from_bytes(_read(self._answers, _SIZE_BYTES, deadline), "big")
                payload = _read(self._answers, size, deadline) if 0 < size <= _RESULT_BYTES else b""
                if not payload:
                    raise LimitError(f"it takes more than {limit:g} s or {_MEMORY_BYTES // 2**30} GiB")
                is_result, value = pickle.loads(payload)
                if not is_result:
                    raise value if isinstance(value, SwiftliteError) else LimitError(value)
                self._left -= 1
                yield value
        except BrokenPipeError:
            raise LimitError("its process was ended") from None
        finally:
            if self._left:
                self.end()


def _run_child(function: Callable[[Q], object], requests: int, answers: int) -> None:
    """Never returns: nothing of the parent's clean-up may run here."""
    try:
        low, high = sorted((requests, answers))
        for first, last in ((3, low), (low + 1, high), (high + 1, os.sysconf("SC_OPEN_MAX"))):
            os.closerange(first, last)  # pipes of others would not end while this process holds them too
        gc.freeze()  # what it has from the parent is not looked through: that would copy it
        asked: SimpleQueue[bytes] = SimpleQueue()

        def receive() -> None:  # always, so that the parent never waits to send while this process waits to send
            while header := _read(requests, _SIZE_BYTES):
                asked.put(_read(requests, int.from_bytes(header, "big")))
            os._exit(0)

        threading.Thread(target=receive, daemon=True).start()
        _limit()
        while True:
            seconds, request = pickle.loads(asked.get())
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                answer = (True, function(request))
            except SwiftliteError as error:
                answer = (False, error)
            except Exception as error:  # whatever it is: the parent says it in one line
                answer = (False, f"{type(error).__name__}: {one_line(error)}")
            _write(answers, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        os._exit(0)


def _limit() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for sent in (signal.SIGINT, signal.SIGHUP):  # the terminal sends them to all processes: the parent decides
        signal.signal(sent, signal.SIG_IGN)
    with open("/proc/self/statm", "rb") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _write(pipe: int, value: object) -> None:
    payload = pickle.dumps(value)
    left = memoryview(len(payload).to_bytes(_SIZE_BYTES, "big") + payload)
    while left:
        left = left[os.write(pipe, left) :]


def _read(reader: int, size: int, deadline: float | None = None) -> bytes:
    """The next `size` bytes of a pipe; nothing if it ends before, or they come too late."""
    found = bytearray()
    while len(found) < size:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reader], [], [], wait)
        part = os.read(reader, min(size - len(found), 2**20)) if ready else b""
        if not part:
            return b""
        found += part
    return bytes(found)


def _end(parent: int, child: int, pipes: Iterable[int]) -> None:
    if os.getpid() != parent:  # a fork of the parent
        return
    for pipe in pipes:
        os.close(pipe)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
