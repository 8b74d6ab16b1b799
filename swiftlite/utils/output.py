"""Output directories of conversions: where one may be written, and which one may be replaced.

args.json of a finished output says what it is and which files belong to it; `--exist_ok true` replaces nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from swiftlite.utils.errors import BudgetError, CheckpointError, UsageError
from swiftlite.utils.io import existing_parent, format_bytes, read_json, write_json

MARKED, MARK = "args.json", "output"  # the file, and its key


def check_output(
    output: Path, kind: str, exist_ok: bool = False, inputs: Iterable[str | os.PathLike[str]] = (), needed: int = 0
) -> None:
    """May `output` be written, or replaced? Nothing is changed.

    Args: kind: what will be written there. inputs: what is read meanwhile. needed: bytes; unfinished files of an
        earlier run count as room, since they are resumed or deleted.
    Raises: UsageError naming what stands in the way; BudgetError if the disk is too small.
    """
    real = Path(os.path.realpath(output))
    here = Path(os.path.realpath("."))
    if real == here or real in here.parents:
        raise UsageError(f"--output_dir {output}: is the working directory or holds it; name a directory of its own")
    if os.path.ismount(real):
        raise UsageError(f"--output_dir {output}: is a whole file system; name a directory in it")
    for source in inputs:
        read = Path(os.path.realpath(source))
        if real == read or real in read.parents:
            raise UsageError(f"--output_dir {output}: holds {source}, which is read; name another directory")
    if real.exists() and not (real.is_dir() and not any(real.iterdir())):
        if not exist_ok:
            raise UsageError(
                f"{output} exists already; choose another --output_dir, or replace it with --exist_ok true"
            )
        _check_replaceable(output, real, kind)
    room = shutil.disk_usage(existing_parent(real)).free + allocated_bytes(partial_of(real))
    if needed > room:
        raise BudgetError(
            f"{output} needs {format_bytes(needed)}, its disk has {format_bytes(room)} free; make room or choose another "
            "--output_dir"
        )


def _check_replaceable(output: Path, real: Path, kind: str) -> None:
    way_on = "--exist_ok true replaces only what such a command wrote; move it away, or choose another --output_dir"
    try:
        mark = read_json(real / MARKED).get(MARK) if (real / MARKED).is_file() else None
    except CheckpointError as error:
        raise UsageError(f"{error}; {way_on}") from None
    if not isinstance(mark, dict):
        raise UsageError(f"{output} holds something that is not an output of `swiftlite export`; {way_on}")
    if mark.get("kind") != kind:
        raise UsageError(f"{output} holds {mark.get('kind')!r}, not {kind!r}; {way_on}")
    written = mark.get("files")
    foreign = sorted(set(files_of(real)) - set(written if isinstance(written, list) else []))
    if foreign:
        raise UsageError(f"{output} also holds {', '.join(foreign[:3])}, which it did not write; {way_on}")


def mark_output(directory: Path, kind: str) -> None:
    """Record what a finished directory is and which files belong to it."""
    path = directory / MARKED
    values = read_json(path, optional=True)
    write_json(path, {**values, MARK: {"kind": kind, "files": sorted({*files_of(directory), MARKED})}})


def files_of(directory: Path) -> list[str]:
    """Every file, link and empty folder below a directory, relative and sorted."""
    found = []
    for folder, names, files in os.walk(directory):
        for name in (*files, *(n for n in names if os.path.islink(os.path.join(folder, n)))):
            found.append(os.path.relpath(os.path.join(folder, name), directory))
        if not names and not files and folder != str(directory):
            found.append(os.path.relpath(folder, directory))
    return sorted(found)


def partial_of(output: Path) -> Path:
    """The hidden sibling in which an output is made; links are followed, so that it is on the output's own disk."""
    real = Path(os.path.realpath(output))
    return real.with_name(f".{real.name}.partial")


def allocated_bytes(directory: Path) -> int:
    """What the files of a directory take on the disk; less than their sizes where they have holes."""
    return sum(
        os.lstat(os.path.join(folder, name)).st_blocks * 512
        for folder, _, names in os.walk(directory)
        for name in names
    )
