"""Rank facts from the launcher's environment, true with and without a process group; and the little talk between ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from swiftlite.utils.errors import UsageError

T = TypeVar("T")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r} in the environment; it must be a number, or be unset") from None


def get_rank() -> int:
    return _number("RANK", 0)


def get_world_size() -> int:
    """Raises: UsageError for WORLD_SIZE without RANK, which launchers set together: a leftover of a cluster's job."""
    size = _number("WORLD_SIZE", 1)
    if size > 1 and "RANK" not in os.environ:
        raise UsageError(f"WORLD_SIZE is {size} in the environment, but RANK is not set; unset WORLD_SIZE, or start the "
                         "processes with NPROC_PER_NODE (or torchrun), which sets both")  # fmt: skip
    if size > 1:
        get_rank()  # a number, too
    return size


def get_local_rank() -> int:
    return _number("LOCAL_RANK", 0)


def get_local_world_size() -> int:
    return _number("LOCAL_WORLD_SIZE", 1)


def is_main_process() -> bool:
    return get_rank() == 0


@contextmanager
def host_group() -> Iterator[None]:
    """A gloo group of all processes for barriers and small messages; nothing where there is one process or a group."""
    if get_world_size() == 1:
        yield
        return
    from datetime import timedelta

    import torch.distributed

    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # one rank may copy for hours
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for all processes; needs a group if there are several."""
    if get_world_size() > 1:
        import torch.distributed

        torch.distributed.barrier()


def all_gather(value: T) -> list[T]:
    """One small picklable value of every process, in rank order."""
    if get_world_size() == 1:
        return [value]
    import torch.distributed

    gathered: list[T] = [value] * get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def num_processes() -> int:
    """Processes of the command itself: a dry run starts none, but the environment says how many there would be."""
    asked: int = math.prod(int(os.environ.get(name) or 1) for name in ("NPROC_PER_NODE", "NNODES"))
    return max(get_world_size(), asked)
