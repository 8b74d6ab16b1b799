"""Moving tensors: a plan of byte copies, run block by block by a few threads inside a fixed memory budget.

A job says which extents make up one run of the output. Blocks are read with pread, cast where the dtype changes, and
written with pwrite to their final place, so memory does not depend on the size of a tensor and the order is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from swiftlite.utils.errors import BudgetError
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import clip
from swiftlite.weights.storage import Extent, Files, byte_view

BLOCK_BYTES = 8 << 20
WORKERS = 4

Locate = Callable[[int, int, int], Iterator[Extent]]


@dataclass(frozen=True)
class Job:
    """One output tensor: gather `segments` of the inputs, cast, and write at `offset` of `file`.

    locate(source, start, stop) gives the extents of bytes [start, stop) of an input. row_size is in elements.
    source_dtypes: dtype of each input; dtype: of the output.
    """

    name: str
    segments: tuple[Segment, ...]
    row_size: int
    locate: Locate
    source_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    file: Path
    offset: int

    @property
    def rows(self) -> int:
        return sum(s.size for s in self.segments)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_size * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """Output rows [start, stop) of a job."""

    job: Job
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.job.row_size * self.job.dtype.itemsize


def blocks(jobs: Iterable[Job], block_bytes: int) -> Iterator[Block]:
    """Cut jobs into blocks of at most block_bytes of output, at least one row each."""
    for job in jobs:
        rows = job.rows
        step = max(block_bytes // max(job.row_size * job.dtype.itemsize, 1), 1)
        for start in range(0, rows, step):
            yield Block(job, start, min(start + step, rows))


def copy_block(block: Block, files: Files, buffer: torch.Tensor) -> torch.Tensor:
    """Read a block's rows into `buffer` (uint8, large enough) and return them in the output dtype, flat."""
    job = block.job
    numel = (block.stop - block.start) * job.row_size
    out = buffer[: numel * job.dtype.itemsize].view(job.dtype)
    view, done = byte_view(out), 0
    for segment in clip(job.segments, block.start, block.stop):
        dtype = job.source_dtypes[segment.source]
        count = segment.size * job.row_size
        width = dtype.itemsize
        first = segment.start * job.row_size * width
        target = out[done : done + count]
        if dtype == job.dtype:
            into = view[done * width : (done + count) * width]
        else:
            raw = torch.empty(count, dtype=dtype)
            into = byte_view(raw)
        position = 0
        for extent in job.locate(segment.source, first, first + count * width):
            files.read_into(extent, into[position : position + extent.size])
            position += extent.size
        if dtype != job.dtype:
            target.copy_(raw)
        done += count
    return out


def run(
    jobs: Sequence[Job],
    *,
    max_memory: int | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    sync: bool = True,
) -> None:
    """Carry out all jobs. Output files must exist at their final size.

    Args: max_memory: bytes that blocks in flight may take. on_bytes: told the output bytes of each finished block, by
        one thread at a time.
    Raises: BudgetError before anything is written if one block cannot fit; whatever reading or writing raises, after
        all threads have stopped.
    """
    block_bytes, workers = fit_budget(jobs, max_memory)
    lock, local = threading.Lock(), threading.local()
    stop = threading.Event()
    with Files() as files:

        def work(batch: Iterator[Block]) -> None:
            while not stop.is_set():
                with lock:
                    block = next(batch, None)
                    if block is None:
                        return
                    files.fd(block.job.file, writable=True)
                if getattr(local, "buffer", None) is None or local.buffer.numel() < block.nbytes:
                    local.buffer = torch.empty(max(block_bytes, block.nbytes), dtype=torch.uint8)
                out = copy_block(block, files, local.buffer)
                job = block.job
                files.write(job.file, job.offset + block.start * job.row_size * job.dtype.itemsize, byte_view(out))
                with lock:
                    on_bytes(block.nbytes)

        pending = blocks(jobs, block_bytes)
        with ThreadPoolExecutor(workers) as pool:
            futures: list[Future[None]] = [pool.submit(work, pending) for _ in range(workers)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
        for future in futures:
            future.result()
        if sync:
            files.sync()


def fit_budget(jobs: Sequence[Job], max_memory: int | None) -> tuple[int, int]:
    """Block size in bytes and number of threads under a budget; a block may need its bytes twice, for a cast."""
    if max_memory is None:
        return BLOCK_BYTES, WORKERS
    largest_row = max(
        (j.row_size * max(j.dtype.itemsize, *(d.itemsize for d in j.source_dtypes)) for j in jobs), default=1
    )
    if 3 * largest_row > max_memory:
        raise BudgetError(
            f"--max_memory of {max_memory / 2**20:.1f} MiB is too small: one row of a tensor takes "
            f"{3 * largest_row / 2**20:.1f} MiB while it is converted; allow at least that"
        )
    workers = max(1, min(WORKERS, max_memory // (3 * max(largest_row, 1 << 20))))
    return max(min(BLOCK_BYTES, max_memory // (3 * workers)), 1), workers
