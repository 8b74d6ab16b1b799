"""Starts worker.py under torchrun and reads what the runs logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[2]

# The first stage of the uneven pipelines holds 1 layer of 4 or 3; odd vocabulary: rows are padded under TP.
# Wide random weights make the descent so uneven that rounding differences grow by themselves.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 4, "vocab_size": 333, "tie_word_embeddings": True, "initializer_range": 0.02},
    "glm4_moe": {"vocab_size": 333, "initializer_range": 0.02},
}
MODEL_TYPES = {"qwen3": "qwen3", "glm4_moe": "glm4_5", "moonlight": "moonlight"}


def torchrun(num_processes: int, cases: list[Any], directory: Path, worker: str = WORKER.name) -> tuple[int, str]:
    """Run the cases one after another in `num_processes` processes. Returns: exit code, what they wrote to stderr."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "cases.json"
    file.write_text(json.dumps(cases))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)),
        *("--master_addr", "127.0.0.1", "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"),
        *(str(WORKER.with_name(worker)), str(file)),
    ]  # fmt: skip
    # Files, not pipes: what a killed run leaves behind would keep a pipe open.
    with (directory / "stdout").open("w") as stdout, (directory / "stderr").open("w") as stderr:
        result = subprocess.run(
            command, env=environment, stdout=stdout, stderr=stderr, timeout=600, check=False, start_new_session=True
        )
    return result.returncode, (directory / "stderr").read_text()


def run_layouts(runs: Mapping[str, tuple[Any, ...]], case: Callable[..., dict[str, Any]], root: Path) -> None:
    """Train every run in `root`/NAME, one torchrun for each world size.

    Args: runs: name -> (kind, world size, flags, fault). case: (kind, output directory, flags) -> what the worker takes.
    """
    for size in sorted({run[1] for run in runs.values()}):
        cases = [
            {**case(kind, root / name, flags), "fault": planted}
            for name, (kind, world_size, flags, planted) in runs.items()
            if world_size == size
        ]
        code, log = torchrun(size, cases, root / f"torchrun-{size}")
        assert code == 0, log[-5000:]


def curve(output_dir: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    lines = [json.loads(line) for line in (output_dir / "logging.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]


def largest_difference(one: list[tuple[float, float]], two: list[tuple[float, float]]) -> float:
    """Largest relative difference of losses and gradient norms over all steps."""
    assert len(one) == len(two)
    return max(abs(a - b) / abs(a) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
