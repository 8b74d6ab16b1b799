"""A process that ends when the one that started it is gone: no worker runs on unseen, and none waits for ever."""

from __future__ import annotations

import os
import signal
import threading
import time

PARENT = "SWIFTLITE_PARENT"  # tells a child who started it; read once
_POLL_SECONDS = 1.0


def end_with_parent(parent: int | None = None, patience: float = 0.0) -> None:
    """Watch the parent from a thread; when it is gone, send this process SIGTERM, and end it after `patience` seconds.

    Args: parent: its process id, default: $SWIFTLITE_PARENT or whoever the parent is now. patience: seconds that a
        handler of SIGTERM has, to save what there is.
    """
    if parent is None:
        parent = int(os.environ.pop(PARENT, None) or os.getppid())

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
