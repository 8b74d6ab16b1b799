"""Starts torchrun when the environment asks for several processes, and ends as it ends.

Environment: NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT. Run as a module, this file is the torchrun
that keeps the workers' exit code (stock torchrun always ends with 1 and a traceback of its own).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from swiftlite.utils.errors import UsageError
from swiftlite.utils.processes import PARENT, end_with_parent


def _count(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environ.get(name, "").strip() or str(default)
    if not text.isdigit() or int(text) < least:
        raise UsageError(f"{name}={text}: must be a whole number from {least}; unset it for {default}")
    return int(text)


def torchrun_args(environ: Mapping[str, str]) -> list[str] | None:
    """torchrun's own arguments, or None where one process is enough or torchrun has started this one already.

    Raises: UsageError for a variable that is not a number, or a NODE_RANK outside NNODES.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return None
    processes, nodes = _count(environ, "NPROC_PER_NODE", 1, 1), _count(environ, "NNODES", 1, 1)
    if processes * nodes == 1:
        return None
    rank = _count(environ, "NODE_RANK", 0, 0)
    if rank >= nodes:
        raise UsageError(f"NODE_RANK={rank}: must be below NNODES={nodes}")
    if nodes > 1 and not environ.get("MASTER_ADDR"):
        raise UsageError(f"NNODES={nodes}: set MASTER_ADDR to the first node's address, the same on every node")
    if nodes > 1:
        port = _count(environ, "MASTER_PORT", 29500, 1)
    else:
        port = _count(environ, "MASTER_PORT", 0, 0) or _free_port()
    address = environ.get("MASTER_ADDR") or "127.0.0.1"
    values = {"nproc_per_node": processes, "nnodes": nodes, "node_rank": rank, "master_addr": address,
              "master_port": port}  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# torchrun kills workers this many seconds after it handed on a signal; by itself after 30, in the middle of the checkpoint
# that a training run writes when it is asked to end.
SHUTDOWN_SECONDS = 1800


def worker_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of torchrun and its workers, where the user says nothing else.

    The machine's cores are divided over the processes, and workers have time to save after a signal.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // _count(environ, "NPROC_PER_NODE", 1, 1))
    return {"OMP_NUM_THREADS": str(threads), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **environ}


def launch(torchrun: Sequence[str], argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `swiftlite ARGV` under torchrun; SIGINT, SIGTERM and SIGHUP are passed on. Returns: the exit code.

    torchrun ends, and the workers with it, when this process is killed.
    """
    command = [sys.executable, "-m", "swiftlite.cli.launcher", *torchrun, "-m", "swiftlite", *argv]
    # A session of its own: Ctrl-C then reaches the workers once, through us, and not twice.
    environment = {**worker_environment(environ), PARENT: str(os.getpid())}
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in numbers}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _torchrun(argv: Sequence[str]) -> int:
    """Run torchrun in this process. Returns: 0, or the exit code of the first worker that failed."""
    end_with_parent(patience=SHUTDOWN_SECONDS)
    os.environ[PARENT] = str(os.getpid())  # for the workers
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    if os.environ.get("SWIFTLITE_LOG_LEVEL", "").upper() != "DEBUG":
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(argv)))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(_torchrun(sys.argv[1:]))
