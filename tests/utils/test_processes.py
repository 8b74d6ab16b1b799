"""Children that end with their parent."""

from __future__ import annotations

import os
import signal
import time

import pytest

from swiftlite.utils import processes


def test_a_child_ends_when_its_parent_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it ignores SIGTERM and waits for ever."""
    monkeypatch.setattr(processes, "_POLL_SECONDS", 0.05)
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        if os.fork() == 0:  # the child holds the pipe open for as long as it lives
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            processes.end_with_parent()
            os.write(write, b"x")
            while True:
                time.sleep(60)
        os.close(write)
        time.sleep(60)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    began = time.monotonic()
    assert os.read(read, 1) == b"", "the end of the pipe"
    assert time.monotonic() - began < 5
    os.close(read)
