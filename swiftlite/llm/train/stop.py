"""SIGTERM, as schedulers send it before they kill: the run ends after the step in hand, with a checkpoint."""

from __future__ import annotations

import signal
from typing import Any

from swiftlite.utils.dist import get_world_size


class StopSignal:
    """`with StopSignal() as stop:` catches SIGTERM; `stop.requested` says whether this process was sent one."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> StopSignal:
        try:
            self._previous = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: the caller's program handles signals
            self._previous = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: Any) -> None:
        self.requested = True

    def agreed(self, device: Any) -> bool:
        """Whether any rank was sent one; the signal reaches ranks in different steps. Collective."""
        if get_world_size() == 1:
            return self.requested
        import torch

        flag = torch.tensor(float(self.requested), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())
