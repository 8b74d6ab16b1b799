"""Rank facts from the launcher's environment, true with and without a process group; and the little talk between ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def get_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def get_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main_process() -> bool:
    return get_rank() == 0


@contextmanager
def host_group() -> Iterator[None]:
    """A gloo group of all processes for barriers and small messages; nothing where there is one process or a group."""
    if get_world_size() == 1:
        yield
        return
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
