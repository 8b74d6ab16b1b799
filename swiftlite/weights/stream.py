"""Moving tensors: a plan of byte copies, run job by job by a few threads inside a fixed memory budget.

A job says which extents make up one tensor of the output. It is read with pread in blocks, cast where the dtype changes,
hashed, and written with pwrite to its final place, so memory does not depend on the size of a tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import xxhash

from swiftlite.utils.dist import get_local_world_size
from swiftlite.utils.errors import BudgetError, VerifyError
from swiftlite.utils.io import format_bytes
from swiftlite.weights.journal import Journal
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import clip
from swiftlite.weights.storage import (
    Decode,
    Files,
    WeightSource,
    byte_view,
    check_overflow,
    decoder,
    files_of,
    overflows,
    place_of,
)

BLOCK_BYTES = 1 << 20  # read, hashed and written while it is in the processor's cache
SCATTERED_BYTES = 1 << 22  # of an input that is read in short runs, whose number falls with the size of a block
MIN_WORKERS, MAX_WORKERS = 4, 16


@dataclass(frozen=True)
class Job:
    """One output tensor, or several: gather `segments` of the inputs, cast, and write at `offset` of `file`.

    inputs: names of the inputs in `source`. row_size is in elements. dtype: of the output. more: where further outputs
    begin, (row, file, offset), by row.
    """

    name: str
    inputs: tuple[str, ...]
    segments: tuple[Segment, ...]
    row_size: int
    source: WeightSource
    dtype: torch.dtype
    file: Path
    offset: int
    more: tuple[tuple[int, Path, int], ...] = ()

    @cached_property
    def source_dtypes(self) -> tuple[torch.dtype, ...]:
        """Of each input as stored."""
        return tuple(self.source.spec(name).dtype for name in self.inputs)

    @cached_property
    def decode(self) -> Decode | None:
        return decoder(self.source)

    @property
    def rows(self) -> int:
        return sum(s.size for s in self.segments)

    def targets(self, start: int, stop: int) -> Iterator[tuple[int, int, Path, int]]:
        """Where output rows [start, stop) go: (first row, row behind the last, file, offset there)."""
        places = [(0, self.file, self.offset), *self.more]
        ends = [*(row for row, _, _ in self.more), self.rows]
        for (first, file, offset), end in zip(places, ends, strict=True):
            low, high = max(start, first), min(stop, end)
            if low < high:
                yield low, high, file, offset + (low - first) * self.row_size * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_size * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """What a row takes while it is worked on; decoding does that in fp32."""
        sizes = (self.dtype.itemsize, *(d.itemsize for d in self.source_dtypes), 4 if self.decode else 1)
        return self.row_size * max(sizes)

    @property
    def in_order(self) -> bool:
        """Each input's rows come in ascending order, so that its hash can be computed on the way."""
        last = [-1] * len(self.inputs)
        for segment in self.segments:
            if segment.start < last[segment.source]:
                return False
            last[segment.source] = segment.start
        return True


class Hasher:
    """xxh3_128 of each input of a job as the output holds it, that is after the cast."""

    def __init__(self, job: Job) -> None:
        self._hashes = {name: xxhash.xxh3_128() for name in job.inputs} if job.in_order else {}

    def update(self, name: str, data: memoryview) -> None:
        if name in self._hashes:
            self._hashes[name].update(data)

    def digests(self, job: Job, files: Files) -> dict[str, str]:
        """Hash of each input; inputs that were not read in order are read again."""
        if self._hashes:
            return {name: h.hexdigest() for name, h in self._hashes.items()}
        return {name: _hash_input(job, source, files) for source, name in enumerate(job.inputs)}


def read_again(job: Job, block_bytes: int, files: Files) -> dict[str, str]:
    """Hash of each input of a job, read and cast as `run` does it."""
    hasher = Hasher(job)
    if job.in_order:
        for _ in copied(job, block_bytes, files, buffer_for([job], block_bytes), hasher, set()):
            pass
    return hasher.digests(job, files)


def check_sources(
    jobs: Sequence[Job], hashes: Mapping[str, str], max_memory: int | None, on_bytes: Callable[[int], object]
) -> None:
    """Read the inputs of all jobs again. Raises: VerifyError naming the first whose hash is not the one in `hashes`."""
    block_bytes, workers = fit_budget(jobs, max_memory)
    with Files() as files, ThreadPoolExecutor(workers) as pool:
        for file in {path for job in jobs for name in job.inputs for path in files_of(job.source, name)}:
            files.forget(file)
        try:
            for job, found in zip(jobs, pool.map(lambda job: read_again(job, block_bytes, files), jobs), strict=True):
                for name, digest in found.items():
                    if digest != hashes[name]:
                        raise VerifyError(
                            f"{name}: the source holds other bytes than those that were converted; it changed meanwhile "
                            "or its disk is failing, run the command again"
                        )
                on_bytes(job.nbytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hash_input(job: Job, source: int, files: Files) -> str:
    rows = sum(s.size for s in job.segments if s.source == source)
    return read_again(replace(job, segments=(Segment(source, 0, rows),)), BLOCK_BYTES, files)[job.inputs[source]]


def hash_tensor(
    source: WeightSource,
    name: str,
    files: Files,
    dtype: torch.dtype | None = None,
    scratch: torch.Tensor | None = None,
) -> str:
    """xxh3_128 of a tensor's row-major bytes, read block by block; of its values in `dtype` if that is another.

    scratch: uint8, memory for a block; new memory for every tensor would leave the heap in pieces.
    """
    spec = source.spec(name)
    decode = decoder(source)
    digest = xxhash.xxh3_128()
    target = dtype or spec.dtype
    plain = target == spec.dtype and decode is None
    row = max(spec.shape[-1], 1) if len(spec.shape) > 1 else 1
    step = max(BLOCK_BYTES // (row * (spec.dtype.itemsize if plain else 4)), 1) * row
    if scratch is None or scratch.numel() < step * spec.dtype.itemsize:
        scratch = torch.empty(min(step, spec.numel) * spec.dtype.itemsize, dtype=torch.uint8)
    buffer = scratch[: step * spec.dtype.itemsize].view(spec.dtype)
    for first in range(0, spec.numel, step):
        block = buffer[: spec.numel - first]
        source.read(name, first, block, files)
        values = block if decode is None else decode(name, first, block)
        digest.update(byte_view(values.to(target)))
    return digest.hexdigest()


def hash_tensors(
    source: WeightSource, names: Sequence[str], files: Files, max_memory: int | None = None
) -> Iterator[tuple[str, str]]:
    """(name, hash) of many tensors, read by several threads in the order of the files."""
    names, local = sorted(names, key=partial(place_of, source)), threading.local()

    def digest(name: str) -> str:
        if not hasattr(local, "scratch"):
            local.scratch = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        return hash_tensor(source, name, files, scratch=local.scratch)

    pool = ThreadPoolExecutor(max(planned_bytes(max_memory) // (3 * BLOCK_BYTES), 1))
    try:
        yield from zip(names, pool.map(digest, names), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def buffer_for(jobs: Sequence[Job], block_bytes: int) -> torch.Tensor:
    """uint8, memory of one thread for a block of any of the jobs; new memory each time would leave the heap in pieces."""
    return torch.empty(max([block_bytes, *(job.row_size * job.dtype.itemsize for job in jobs)]), dtype=torch.uint8)


def copied(
    job: Job, block_bytes: int, files: Files, buffer: torch.Tensor, hasher: Hasher, overflowed: set[str]
) -> Iterator[tuple[int, int, memoryview]]:
    """Output rows [start, stop) of each block of a job and their bytes, which stand in `buffer` until the next one.

    Blocks have at most block_bytes while they are worked on, but at least one row. Inputs whose values the output's dtype
    cannot hold are added to `overflowed`.
    """
    step = max(block_bytes // max(job.row_bytes, 1), 1)
    for start in range(0, job.rows, step):
        stop = min(start + step, job.rows)
        out = buffer[: (stop - start) * job.row_size * job.dtype.itemsize].view(job.dtype)
        _copy_rows(job, start, stop, files, out, hasher, overflowed)
        yield start, stop, byte_view(out)


def _copy_rows(
    job: Job, start: int, stop: int, files: Files, out: torch.Tensor, hasher: Hasher, overflowed: set[str]
) -> None:
    """Read output rows [start, stop) into `out`, flat."""
    view, done = byte_view(out), 0
    out_width = job.dtype.itemsize
    for segment in clip(job.segments, start, stop):
        dtype = job.source_dtypes[segment.source]
        count = segment.size * job.row_size
        name, first = job.inputs[segment.source], segment.start * job.row_size
        raw = None if dtype == job.dtype and job.decode is None else torch.empty(count, dtype=dtype)
        into = out[done : done + count] if raw is None else raw
        job.source.read(name, first, into, files)
        if raw is not None:
            if job.decode is not None:
                raw = job.decode(name, first, raw)
            out[done : done + count].copy_(raw)
            if overflows(raw, out[done : done + count]):
                overflowed.add(name)
        hasher.update(name, view[done * out_width : (done + count) * out_width])
        done += count


def run(
    jobs: Sequence[Job],
    *,
    max_memory: int | None = None,
    on_bytes: Callable[[int], object] = lambda count: None,
    journal: Journal | None = None,
    allow_overflow: bool = False,
) -> dict[str, str]:
    """Carry out all jobs. Output files must exist at their final size; they are on the disk when this returns.

    Args: max_memory: bytes that blocks in flight may take. on_bytes: told the output bytes of each finished block, by
        one thread at a time. journal: jobs that it lists are skipped if their inputs still have the hashes that it gives;
        finished ones are added once they are on the disk. allow_overflow: only warn of finite values that the output's
        dtype makes infinite.
    Returns: input name -> hash of its values as written.
    Raises: BudgetError before anything is written if one block cannot fit; after all threads have stopped, whatever
        reading or writing raises, or what check_overflow does.
    """
    block_bytes, workers = fit_budget(jobs, max_memory)
    with Files() as files, ThreadPoolExecutor(workers) as pool:
        shared = _Shared(jobs, block_bytes, files, on_bytes, journal)
        futures: list[Future[None]] = [pool.submit(shared.work) for _ in range(workers)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            shared.stop.set()
        for future in futures:
            future.result()
        files.sync()
    if journal is not None:
        journal.write(journal.take())
    for dtype, names in shared.overflowed.items():
        check_overflow(names, dtype, allow_overflow)
    return shared.digests


class _Shared:
    """What the threads of a run share: the jobs that wait, the results, and whether to stop."""

    def __init__(
        self, jobs: Sequence[Job], block_bytes: int, files: Files, on_bytes: Callable[[int], object],
        journal: Journal | None,
    ) -> None:  # fmt: skip
        self._jobs, self._pending = jobs, iter(jobs)
        self._block_bytes = block_bytes
        self._files, self._on_bytes = files, on_bytes
        self._journal, self._lock = journal, threading.Lock()
        self._done = journal.done if journal is not None else {}
        self.stop = threading.Event()
        self.digests: dict[str, str] = {}
        self.overflowed: dict[torch.dtype, set[str]] = {}

    def work(self) -> None:
        """One thread: job after job, until none is left or another thread has failed."""
        buffer = buffer_for(self._jobs, self._block_bytes)
        while (job := self._next()) is not None:
            if not self._skip(job):
                self._carry_out(job, buffer)

    def _next(self) -> Job | None:
        with self._lock:
            return None if self.stop.is_set() else next(self._pending, None)

    def _skip(self, job: Job) -> bool:
        """Has an earlier run done this job, with the inputs as they are now?"""
        noted = self._done.get(job.name)
        if noted is None or read_again(job, self._block_bytes, self._files) != noted:
            return False
        with self._lock:
            self.digests.update(noted)
            self._on_bytes(job.nbytes)
        return True

    def _carry_out(self, job: Job, buffer: torch.Tensor) -> None:
        hasher, lost = Hasher(job), set[str]()
        width = job.row_size * job.dtype.itemsize
        for start, stop, data in copied(job, self._block_bytes, self._files, buffer, hasher, lost):
            if self.stop.is_set():
                return
            for low, high, file, offset in job.targets(start, stop):
                self._files.write(file, offset, data[(low - start) * width : (high - start) * width])
            with self._lock:
                self._on_bytes(len(data))
        self._note(job, hasher.digests(job, self._files), lost)

    def _note(self, job: Job, found: dict[str, str], lost: set[str]) -> None:
        with self._lock:
            self.digests.update(found)
            if lost:  # not noted as done: whoever resumes is to be told, too
                self.overflowed.setdefault(job.dtype, set()).update(lost)
                return
            batch = self._journal.add(job.name, job.nbytes, found) if self._journal else []
        if self._journal and batch:
            self._files.sync()
            with self._lock:
                self._journal.write(batch)


def workers_here() -> int:
    """Threads of this process: two for each core, which it may share with other processes of the run.

    A thread waits for the disk half of its time; beyond MAX_WORKERS a disk gains nothing.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(2 * cores // get_local_world_size(), MIN_WORKERS), MAX_WORKERS)


def planned_bytes(max_memory: int | None) -> int:
    """What the blocks of a run take at most; without a limit this follows from the machine's cores."""
    default = 3 * BLOCK_BYTES * workers_here()
    return default if max_memory is None else min(default, max_memory)


def fit_budget(jobs: Sequence[Job], max_memory: int | None) -> tuple[int, int]:
    """Block size in bytes and number of threads under a budget; a block may need its bytes twice, for a cast."""
    most, largest_row = workers_here(), max((job.row_bytes for job in jobs), default=1)
    if max_memory is not None and 3 * largest_row > max_memory:
        raise BudgetError(
            f"--max_memory of {format_bytes(max_memory)} is too small: one row of a tensor takes "
            f"{format_bytes(3 * largest_row)} while it is converted; allow at least that"
        )
    planned = planned_bytes(max_memory)
    if planned > 3 * BLOCK_BYTES and any(job.source.scattered(name) for job in jobs for name in job.inputs):
        block = min(SCATTERED_BYTES, planned // 3)
        return block, planned // (3 * block)
    if max_memory is None:
        return BLOCK_BYTES, most
    workers = max(1, min(most, max_memory // (3 * max(largest_row, 1 << 20))))
    return max(min(BLOCK_BYTES, max_memory // (3 * workers)), 1), workers
