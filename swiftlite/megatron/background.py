"""Writing checkpoints while training continues: a snapshot in host memory, written by a forked process, finished later.

One snapshot exists at a time, and only if half of the free memory holds it; else the write happens at once. What is
written counts only after `finish` has run on all ranks. Imports no megatron-core.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from swiftlite.utils.dist import get_local_world_size
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import available_memory_bytes, format_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.processes import end_with_parent


@dataclass
class Write:
    """One thing to be written.

    now: writes, in this process. stage: takes a snapshot (host memory, nbytes) and returns what writes it, in any process.
    finish: makes what was written valid, on all ranks, after all of them have written. Collective.
    """

    nbytes: int
    now: Callable[[], None]
    stage: Callable[[], Callable[[], None]]
    finish: list[Callable[[], None]] = field(default_factory=list)

    def run(self) -> None:
        """Write and finish now. Collective."""
        self.now()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        for finish in self.finish:
            finish()


class BackgroundWriter:
    """The snapshot that is being written, if any. All methods are collective."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: Any = None
        self._finish: list[Callable[[], None]] = []

    def start(self, writes: Sequence[Write], then: Callable[[], None]) -> None:
        """Begin to write, after what was begun before is finished. then: called on every rank at the end of all."""
        self.finish(wait=True)
        needed, room = sum(write.nbytes for write in writes), available_memory_bytes() // 2 // get_local_world_size()
        if not self._agree(needed <= room, torch.distributed.ReduceOp.MIN):
            get_logger().warning(
                "--async_save true: a snapshot of %s does not fit into half of the free memory (%s for this process); "
                "saving while training waits", format_bytes(needed), format_bytes(room),
            )  # fmt: skip
            for write in writes:
                write.run()
            then()
            return
        staged = [write.stage() for write in writes]
        # A fork sees the memory as it is now: on a CPU that is the snapshot, on a GPU `stage` has copied it.
        self._process = multiprocessing.get_context("fork").Process(target=_write, args=(staged,))
        self._process.start()
        self._finish = [finish for write in writes for finish in write.finish] + [then]

    def finish(self, wait: bool = False) -> None:
        """Make valid what has been written meanwhile; wait: until it is.

        Raises: CheckpointError on every rank if the writing failed on one.
        """
        if not self._finish:
            return
        if wait and self._process is not None:
            self._process.join()
        if not self._agree(not self._process.is_alive(), torch.distributed.ReduceOp.MIN):
            return
        self._process.join()
        failed, todo = self._process.exitcode != 0, self._finish
        self._process, self._finish = None, []
        if self._agree(failed, torch.distributed.ReduceOp.MAX):
            raise CheckpointError(
                "a checkpoint could not be written in the background (its error is above); the one before it is "
                "complete, and the same command resumes from there"
            )
        for step in todo:
            step()

    def _agree(self, value: bool, op: torch.distributed.ReduceOp.RedOpType) -> bool:
        flag = torch.tensor(float(value), device=self._device)
        torch.distributed.all_reduce(flag, op=op)
        return bool(flag.item())


def _write(staged: Sequence[Callable[[], None]]) -> None:
    """In the forked process. A stop of the run lets it come to its end: the run waits for it, unless it is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(os.getppid())
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for write in staged:
        write()
