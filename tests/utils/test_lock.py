"""Locks of output directories: who is refused, who takes over, and file systems without flock."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
from pathlib import Path

import pytest

from swiftlite.utils import lock
from swiftlite.utils.errors import UsageError
from swiftlite.utils.lock import lock_file, output_lock


@pytest.fixture(params=["flock", "no flock"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no flock":

        def flock(fd: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return str(request.param)


def test_a_refused_process_leaves_the_lock_alone(system: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with output_lock(tmp_path / "out"):
        held = sorted(p.name for p in tmp_path.glob(".out.lock*"))
        for name in ("out", "out", "link"):  # a link and what it points to are one output
            with pytest.raises(UsageError, match=r"another swiftlite process.*process \d+ on .*, since 20"):
                with output_lock(tmp_path / name):
                    pass
            assert sorted(p.name for p in tmp_path.glob(".out.lock*")) == held != []
    assert not list(tmp_path.glob(".out.lock*"))
    with output_lock(tmp_path / "out"):
        pass


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ends between our open and our flock: the descriptor is of a file that nobody else will find."""
    path, real, calls = lock_file(tmp_path / "out"), fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with output_lock(tmp_path / "out"):
        assert path.is_file()
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(UsageError, match="another swiftlite process"), output_lock(tmp_path / "out"):
            pass


def test_without_flock_a_dead_process_of_this_host_is_told_from_a_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    child = subprocess.Popen(["true"])
    child.wait()
    mine = json.loads(lock._about_me())
    exclusive = tmp_path / ".out.lock.exclusive"
    others = {"dead": {**mine, "pid": child.pid}, "number used again": {**mine, "start": "another"}}
    for facts in others.values():
        exclusive.write_text(json.dumps(facts))
        with output_lock(tmp_path / "out"):
            assert json.loads(exclusive.read_text())["pid"] == mine["pid"]
        assert not exclusive.exists()
    for text in (json.dumps({**mine, "pid": child.pid, "host": "elsewhere"}), "", "[" * 9999):
        exclusive.write_text(text)
        with pytest.raises(UsageError, match=r"remove .*\.exclusive if no such process"), output_lock(tmp_path / "out"):
            pass
        assert exclusive.read_text() == text


def test_other_failures_of_flock_are_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), output_lock(tmp_path / "out"):
        pass
