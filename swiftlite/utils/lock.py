"""One process at a time for an output directory, be it a conversion's or a training run's.

The lock file is a hidden sibling of the output. It says who holds it: host, process id, time of start.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Hold the lock of `output` (which need not exist, but its parent must) until the block ends. On one rank only.

    The system gives the lock back when the process ends, however that happens. A file system without flock gets a lock
    file that only one process can create; one that a dead process of this host left is taken over.
    Raises: UsageError if another process holds it, saying which.
    """
    path = lock_file(output)
    fd = _flocked(path, output)
    if fd is not None:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the file open, too
            os.close(fd)
        return
    exclusive = path.with_name(f"{path.name}.exclusive")
    get_logger().warning("%s: this file system has no flock; %s stands for the lock", output, exclusive)
    _create_exclusively(exclusive, output)
    try:
        yield
    finally:
        exclusive.unlink(missing_ok=True)


def lock_file(output: Path) -> Path:
    real = Path(os.path.realpath(output))  # a link and what it points to are one output
    return real.with_name(f".{real.name}.lock")


def _flocked(path: Path, output: Path) -> int | None:
    """A descriptor of the lock file with the lock on it, or None where there is no flock."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in _TAKEN:
                raise _refusal(path, output) from None
            if error.errno not in _NO_FLOCK:
                raise
            path.unlink(missing_ok=True)
            return None
        try:
            same = os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            same = False
        if same:
            os.truncate(fd, 0)
            os.pwrite(fd, _about_me(), 0)
            return fd
        os.close(fd)  # its holder removed it between our open and our lock


def _create_exclusively(path: Path, output: Path) -> None:
    for _ in range(3):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            stale = _holder(path)
            if not _is_stale(stale):
                raise _refusal(path, output, f" (or remove {path} if no such process is at work)") from None
            get_logger().warning("%s: the process that made it is gone; taking over", path)
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                path.rename(aside)
            except FileNotFoundError:
                continue
            if _holder(aside) != stale:  # another process took over first: this one is its lock
                aside.rename(path)
            else:
                aside.unlink()
            continue
        os.write(fd, _about_me())
        os.fsync(fd)
        os.close(fd)
        return
    raise _refusal(path, output)


def _refusal(path: Path, output: Path, more: str = "") -> UsageError:
    holder = _holder(path)
    who = (
        f" (process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')})"
        if holder
        else f" (lock file {path})"
    )
    return UsageError(f"another swiftlite process is writing {output}{who}; wait for it or stop it{more}")


def _holder(path: Path) -> Json:
    """What the lock file says of its holder, {} if nothing (yet)."""
    try:
        value = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _about_me() -> bytes:
    pid = os.getpid()
    facts = {
        "host": socket.gethostname(), "pid": pid, "since": time.strftime("%Y-%m-%d %H:%M:%S"), "start": _start(pid),
    }  # fmt: skip
    return json.dumps(facts).encode()


def _start(pid: int) -> str | None:
    """When a process of this host started, so that a number used again is told apart; None if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _is_stale(holder: Json) -> bool:
    """True only if the holder was a process of this host that is gone."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if holder.get("start") is not None:
        return bool(_start(pid) != holder["start"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
