"""Files and directories that are either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftlite.utils.errors import BudgetError, UsageError


def check_new(path: Path, exist_ok: bool = False) -> None:
    """Raises: UsageError if `path` exists and is not an empty directory, unless exist_ok."""
    if path.exists() and not exist_ok and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path} exists already; choose another --output_dir, or replace it with --exist_ok true")


def replace_directory(source: Path, target: Path) -> None:
    """Rename `source` to `target`; what was at `target` is removed after the new one stands."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    sync_directory(target.parent)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text_atomic(path: Path, text: str) -> None:
    """Write through a temporary sibling, so that a reader sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second, read from and written to the disk itself."""

    read: float
    write: float


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def probe_disk(directory: Path, seconds: float = 2.0) -> DiskSpeed | None:
    """Measure the disk that will hold `directory` with a temporary file, half the time writing, half reading.

    Returns: None where nothing can be written.
    """
    directory, block = existing_parent(directory), os.urandom(32 << 20)
    room = shutil.disk_usage(directory).free // 4
    buffer = bytearray(len(block))
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            written = read = 0
            started = time.perf_counter()
            while written <= room and (not written or time.perf_counter() - started < seconds / 2):
                written += sum(file.write(block) for _ in range(8))
                os.fdatasync(file.fileno())
            write_rate = written / (time.perf_counter() - started)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while (count := file.readinto(buffer)) and time.perf_counter() - started < seconds / 2:
                read += count
            return DiskSpeed(max(read, count) / (time.perf_counter() - started), write_rate)
    except OSError:
        return None


def check_disk(directory: Path, needed: int) -> None:
    """Raises: BudgetError if the file system that will hold `directory` has less than `needed` bytes free."""
    free = shutil.disk_usage(existing_parent(directory)).free
    if needed > free:
        raise BudgetError(
            f"{directory} needs {format_bytes(needed)}, its disk has {format_bytes(free)} free; make room or "
            "choose another --output_dir"
        )


def format_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory_bytes() -> int:
    """Largest resident size that this process has had, or what getrusage says where there is no /proc.

    getrusage also counts what the parent held when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10


def available_memory_bytes() -> int:
    """Memory that programs can still have on this machine, page cache given up; a guess of 4 GB where it is not told."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
        return next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 << 30
