"""Files and directories that are either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import sys
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


def check_disk(directory: Path, needed: int) -> None:
    """Raises: BudgetError if the file system that will hold `directory` has less than `needed` bytes free."""
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise BudgetError(
            f"{directory} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free; make room or "
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
