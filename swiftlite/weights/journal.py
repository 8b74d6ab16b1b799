"""Where a conversion works until it is whole: a hidden sibling of the output, with a journal so that a killed one resumes.

A journal line is written only after the data it speaks of is on the disk. It holds the hashes of what was read, and counts
only where reading the source again gives the same. The fingerprint of source and options stands next to the journals;
another one makes them void.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from swiftlite.utils.dist import barrier, get_rank
from swiftlite.utils.errors import CheckpointError, SwiftliteError, UncheckedError, UsageError
from swiftlite.utils.io import hidden, replace_directory, restore_directory, write_text_atomic
from swiftlite.utils.lock import output_lock
from swiftlite.utils.logger import get_logger
from swiftlite.utils.output import mark_output, partial_of

FLUSH_BYTES = 512 << 20
FLUSH_SECONDS = 5.0
HEAD_BYTES, MAX_HEADER_BYTES = 1 << 20, 100 << 20
STATE = "conversion-state"  # folder inside the hidden sibling; gone before the rename

Batch = list[tuple[str, dict[str, str]]]


class Journal:
    """Finished jobs of one process. Not thread-safe: callers hold a lock around `add`, `take` and `write`."""

    def __init__(self, directory: Path, rank: int) -> None:
        """Reads what all processes of earlier runs wrote in `directory`; writes a file of its own."""
        self.done: dict[str, dict[str, str]] = {}
        for path in sorted(directory.glob("journal-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    self.done[record["job"]] = record["hashes"]
                except (ValueError, KeyError):
                    continue  # the line that a kill cut short
        self._file = (directory / f"journal-{rank}.jsonl").open("a")
        if self._file.tell():
            self._file.write("\n")  # ends a line that was cut short
        self._pending: Batch = []
        self._bytes, self._flushed = 0, time.monotonic()

    def add(self, job: str, nbytes: int, hashes: dict[str, str]) -> Batch:
        """Note a finished job. Returns: what should be synced and written now, or []."""
        self._pending.append((job, hashes))
        self._bytes += nbytes
        due = self._bytes >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS
        return self.take() if due else []

    def take(self) -> Batch:
        """The jobs that are noted but not written."""
        batch, self._pending = self._pending, []
        self._bytes, self._flushed = 0, time.monotonic()
        return batch

    def write(self, batch: Batch) -> None:
        """Record jobs whose data is on the disk."""
        for job, hashes in batch:
            self._file.write(json.dumps({"job": job, "hashes": hashes}) + "\n")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error

    def close(self) -> None:
        self._file.close()


def fingerprint(files: Iterable[Path], options: object) -> str:
    """Identity of a conversion in two lines: what its journal is bound to, and what changes if the source is touched.

    The first line is of names, sizes, the heads of the files (all that describes tensors) and what was asked for; that
    the tensors' values are those of the journal is seen by reading them again. The second has the times of change.
    """
    facts, times = [], []
    for path in sorted(files):
        stat = path.stat()
        facts.append([path.name, stat.st_size, hashlib.sha256(_head(path)).hexdigest()])
        times.append(stat.st_mtime_ns)
    bound = hashlib.sha256(json.dumps([facts, options], sort_keys=True, default=str).encode()).hexdigest()
    return f"{bound}\n{times}"


def _head(path: Path) -> bytes:
    """The header of a safetensors file, the whole of a small file."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        if path.suffix == ".safetensors":
            length = 8 + int.from_bytes(head[:8], "little")
            return head[:length] + file.read(max(min(length, MAX_HEADER_BYTES) - len(head), 0))
        return head


@dataclass(frozen=True)
class Workspace:
    """directory: the hidden sibling, to be filled. resumed: it holds work of an earlier run."""

    directory: Path
    journal: Journal
    resumed: bool


@contextmanager
def workspace(
    output: Path, check: Callable[..., None], kind: str, identity: Callable[[], str], prepare: Callable[[Path], None]
) -> Iterator[Workspace]:
    """Work in a hidden sibling of `output`, which takes its name when the block ends without an error. Collective.

    A kill, an I/O error or a check that cannot run leaves the sibling, and the next run with the same identity resumes
    from it; an error in the input removes it. `prepare` fills a fresh directory with the files at their final size, on
    rank 0.
    Args: check: check_output for this output, asked now and before it is replaced. kind: see mark_output.
        identity: see fingerprint; asked again at the end: a source that changed meanwhile is an error.
    Raises: UsageError if `output` may not be written, or another process is at work on it.
    """
    check()
    output = Path(os.path.realpath(output))  # a link to a large disk: the work is there, too
    directory = partial_of(output)
    state, main = directory / STATE, get_rank() == 0
    output.parent.mkdir(parents=True, exist_ok=True)
    mine = identity()
    barrier()
    with output_lock(output) if main else nullcontext():
        resumed = False
        if main:
            restore_directory(output)
            check(needed=0)  # it may have put an output back
            resumed = _claim(directory, output, mine, prepare)
        barrier()
        journal = Journal(state, get_rank())
        barrier()
        try:
            try:
                with hidden(directory):
                    yield Workspace(directory, journal, resumed)
                barrier()
                if identity() != mine:
                    raise CheckpointError("the source changed while it was read; run the command again")
            finally:
                journal.close()
            if main:
                _publish(directory, output, check, kind)
        except UncheckedError:
            raise
        except SwiftliteError:
            if main:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        except OSError:
            get_logger().warning("what is done stays in %s; the same command resumes there", directory)
            raise
        barrier()


def _publish(directory: Path, output: Path, check: Callable[..., None], kind: str) -> None:
    """Give the finished directory its name; if that fails, it stays as it was, journal and all."""
    try:
        check(needed=0)  # hours may have passed
    except UsageError as error:
        raise UncheckedError(f"{error}. What was made is kept in {directory}") from None
    state, aside = directory / STATE, output.with_name(f".{output.name}.{STATE}")
    state.rename(aside)
    try:
        with hidden(directory):
            mark_output(directory, kind)
        replace_directory(directory, output)
    except OSError:
        aside.rename(state)
        raise
    shutil.rmtree(aside)


def _claim(directory: Path, output: Path, identity: str, prepare: Callable[[Path], None]) -> bool:
    """Make the hidden sibling ready. Returns: True if it holds finished work of the same conversion."""
    mark, aside = directory / STATE / "identity", output.with_name(f".{output.name}.{STATE}")
    if aside.exists():  # killed while the finished directory was to take its name
        if directory.is_dir() and not mark.is_file():
            aside.rename(directory / STATE)
        else:
            shutil.rmtree(aside)
    if mark.is_file() and mark.read_text() == identity.partition("\n")[0]:
        get_logger().info("resuming the unfinished conversion in %s", directory)
        return True
    if directory.exists():
        get_logger().info(
            "%s belongs to another source or other options, or had hardly begun; starting over", directory
        )
        shutil.rmtree(directory)
    (directory / STATE).mkdir(parents=True)
    prepare(directory)
    write_text_atomic(mark, identity.partition("\n")[0])
    return False
