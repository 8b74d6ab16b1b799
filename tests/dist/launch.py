"""Runs training cases in several processes and reads what they logged.

Processes are started once per world size and take one job after another: importing torch and megatron-core takes
longer than most cases. Those that a case kills, or that fail, are started anew for the next job.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds a job may take

# The first stage of the uneven pipelines holds 1 layer of 4 or 3; odd vocabulary: rows are padded under TP.
# Wide random weights make the descent so uneven that rounding differences grow by themselves.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "vocab_size": 333, "tie_word_embeddings": True, "initializer_range": 0.02},
    "glm4_moe": {"vocab_size": 333, "initializer_range": 0.02},
}
MODEL_TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "moonlight": "moonlight"}


class Workers:
    """The processes of one torchrun (tests/dist/worker.py) and the directory through which they get their jobs."""

    def __init__(self, size: int) -> None:
        self.size, self.jobs = size, 0
        self.directory = Path(tempfile.mkdtemp(prefix=f"workers-{size}-"))
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size)),
            *("--master_addr", "127.0.0.1", "--master_port", "0"),
            *("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
            *("-m", "tests.dist.worker", str(self.directory), str(os.getpid())),
        ]
        # A file, not a pipe: what a killed run leaves behind would keep a pipe open.
        with (self.directory / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=stderr, stderr=stderr, start_new_session=True
            )
        atexit.register(self.stop)

    def run(self, module: str, cases: list[Any]) -> tuple[int, str]:
        """Returns: 0 or the exit code of the processes, what the job wrote to stderr and stdout."""
        log = self.directory / "stderr"
        start = log.stat().st_size
        job = self.directory / f"job-{self.jobs}.json"
        job.with_suffix(".part").write_text(json.dumps({"module": module, "cases": cases}))
        job.with_suffix(".part").rename(job)
        done = [self.directory / f"done-{self.jobs}-{rank}" for rank in range(self.size)]
        self.jobs += 1
        deadline = time.monotonic() + TIMEOUT
        while not all(file.exists() for file in done) and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(f"{module}: still running after {TIMEOUT} s: {log.read_text()[start:][-3000:]}")
            time.sleep(0.05)
        return self.process.poll() or 0, log.read_bytes()[start:].decode(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


_workers: dict[int, Workers] = {}


def run_cases(num_processes: int, cases: list[Any], module: str = "tests.dist.worker") -> tuple[int, str]:
    """Run the cases one after another, by `module`.run_case, in `num_processes` processes.

    Returns: exit code, what they wrote to stderr and stdout.
    """
    workers = _workers.get(num_processes)
    if workers is None or workers.process.poll() is not None:
        workers = _workers[num_processes] = Workers(num_processes)
    return workers.run(module, cases)


def run_layouts(runs: Mapping[str, tuple[Any, ...]], case: Callable[..., dict[str, Any]], root: Path) -> None:
    """Train every run in `root`/NAME.

    Args: runs: name -> (kind, world size, flags, fault). case: (kind, output directory, flags) -> what the worker takes.
    """
    for size in sorted({run[1] for run in runs.values()}):
        cases = [
            {**case(kind, root / name, flags), "fault": planted}
            for name, (kind, world_size, flags, planted) in runs.items()
            if world_size == size
        ]
        code, log = run_cases(size, cases)
        assert code == 0, log[-5000:]


def curve(output_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    lines = [json.loads(line) for line in (output_dir / "logging.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


def largest_difference(one: list[tuple[float, float]], two: list[tuple[float, float]]) -> float:
    """Largest relative difference of losses and gradient norms over all steps."""
    assert len(one) == len(two)
    return max(abs(a - b) / abs(a) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
