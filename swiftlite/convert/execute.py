"""Carrying out a plan: jobs divided over processes with a progress bar, and the check that reads everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from swiftlite.utils.dist import all_gather, barrier, get_local_world_size, get_rank, get_world_size
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.weights import stream
from swiftlite.weights.journal import Workspace
from swiftlite.weights.storage import Files, WeightSource


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    with progress_bar(total=total, unit="B", unit_scale=True, desc=what, disable=get_rank() != 0) as bar:
        yield bar.update


def run_jobs(
    what: str, jobs: list[stream.Job], max_memory: int | None, space: Workspace, allow_overflow: bool = False
) -> dict[str, str]:
    """This process' share of the jobs. Returns: the hashes of all processes."""
    jobs = share(jobs, get_rank(), get_world_size())
    with progress(what, sum(job.nbytes for job in jobs)) as update:
        mine = stream.run(jobs, max_memory=_per_process(max_memory), on_bytes=update, journal=space.journal,
                          allow_overflow=allow_overflow)  # fmt: skip
    return {name: digest for part in all_gather(mine) for name, digest in part.items()}


def share(jobs: list[stream.Job], rank: int, world_size: int) -> list[stream.Job]:
    """The jobs of one process: whole output files, so that no two write one file, balanced by bytes."""
    sizes: dict[Path, int] = {}
    for job in jobs:
        sizes[job.file] = sizes.get(job.file, 0) + job.nbytes
    loads, owner = [0] * world_size, {}
    for file, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owner[file] = loads.index(min(loads))
        loads[owner[file]] += size
    return [job for job in jobs if owner[job.file] == rank]


def _per_process(max_memory: int | None) -> int | None:
    return None if max_memory is None else max_memory // get_local_world_size()


def verify_bitwise(
    written: WeightSource,
    hashes: Mapping[str, str],
    jobs: list[stream.Job],
    max_memory: int | None,
) -> None:
    """Read source and output again from the disk and compare with the hashes that the conversion took. Collective.

    Args: hashes: what `run_jobs` gave for `jobs`.
    Raises: VerifyError naming the first tensor that differs.
    """
    jobs = share(jobs, get_rank(), get_world_size())
    with progress("verify source", sum(job.nbytes for job in jobs)) as update:
        stream.check_sources(jobs, hashes, _per_process(max_memory), update)
    names = sorted(hashes)[get_rank() :: get_world_size()]
    total = sum(written.spec(name).nbytes for name in names)
    with progress("verify", total) as update, Files() as files:
        for file in {extent.file for name in names for extent in written.extents(name, 0, written.spec(name).nbytes)}:
            files.forget(file)
        for name, found in stream.hash_tensors(written, names, files, _per_process(max_memory)):
            if found != hashes[name]:
                raise VerifyError(f"{name} reads back with other bytes than were written; the disk may be failing")
            update(written.spec(name).nbytes)
    barrier()
    get_logger().info("verified: %d tensors read back bit for bit", len(hashes))
