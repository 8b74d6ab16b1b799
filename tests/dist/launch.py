"""Runs training cases in several processes and reads what they logged.

Processes are forked once per world size, from one that has imported everything, and take one job after another:
importing torch and megatron-core takes longer than most cases. Those that a case kills, or that fail, are forked anew
for the next job.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.dist import worker

TIMEOUT = 600  # seconds a job may take
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(worker.IMPORTED)

# The first stage of the uneven pipelines holds 1 layer of 4 or 3; odd vocabulary: rows are padded under TP.
# Wide random weights make the descent so uneven that rounding differences grow by themselves.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "vocab_size": 333, "tie_word_embeddings": True, "initializer_range": 0.02},
    "glm4_moe": {"vocab_size": 333, "initializer_range": 0.02},
    # Blocks of their own. One key head of OLMo 2, which TP ranks both hold.
    "glm4_0414": {"initializer_range": 0.02, "num_key_value_heads": 2},
    "olmo2": {"initializer_range": 0.02, "num_key_value_heads": 1},
    "granite": {"initializer_range": 0.02, "num_key_value_heads": 2, "logits_scaling": 0.5},
    "gemma3_text": {"initializer_range": 0.02, "num_attention_heads": 4, "num_key_value_heads": 2},
    "hunyuan_v1_moe": {"initializer_range": 0.02, "num_key_value_heads": 2},
    # Both kinds of layers on each stage.
    "qwen3_next": {
        "initializer_range": 0.02, "layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4,
    },
    "gpt_oss": {"initializer_range": 0.02, "num_key_value_heads": 2},
    "gemma2": {"initializer_range": 0.02, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama4_text": {"initializer_range": 0.02, "num_key_value_heads": 2},
    "ministral3": {"initializer_range": 0.02, "num_key_value_heads": 2},
    # Groups that megatron-core would rank by one score; indexers, which no rank holds.
    "glm_moe_dsa": {
        "initializer_range": 0.02, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 12,
        "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "routed_scaling_factor": 1.0, "index_topk": 4096,
    },
}  # fmt: skip
MODEL_TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "moonlight": "moonlight"}


class Workers:
    """The processes of one group (tests/dist/worker.py) and the directory through which they get their jobs."""

    def __init__(self, size: int) -> None:
        self.size, self.jobs = size, 0
        self.directory = Path(tempfile.mkdtemp(prefix=f"workers-{size}-"))
        self.log = self.directory / "log"
        self.log.touch()
        self.process = _FORKS.Process(target=worker.start, args=(size, self.directory, self.log, os.getpid()))
        self.process.start()
        atexit.register(self.stop)

    def run(self, module: str, cases: list[Any]) -> tuple[int, str]:
        """Returns: 0 or the exit code of the processes, what the job wrote to stderr and stdout."""
        start = self.log.stat().st_size
        job = self.directory / f"job-{self.jobs}.json"
        job.with_suffix(".part").write_text(json.dumps({"module": module, "cases": cases}))
        job.with_suffix(".part").rename(job)
        done = [self.directory / f"done-{self.jobs}-{rank}" for rank in range(self.size)]
        self.jobs += 1
        deadline = time.monotonic() + TIMEOUT
        while not all(file.exists() for file in done) and self.process.exitcode is None:
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(f"{module}: still running after {TIMEOUT} s: {self.log.read_text()[start:][-3000:]}")
            time.sleep(0.05)
        return self.process.exitcode or 0, self.log.read_bytes()[start:].decode(errors="replace")

    def stop(self) -> None:
        if self.process.exitcode is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # itself and all ranks
            self.process.join()


_workers: dict[int, Workers] = {}


def run_cases(num_processes: int, cases: list[Any], module: str = "tests.dist.worker") -> tuple[int, str]:
    """Run the cases one after another, by `module`.run_case, in `num_processes` processes.

    Returns: exit code, what they wrote to stderr and stdout.
    """
    workers = _workers.get(num_processes)
    if workers is None or workers.process.exitcode is not None:
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
