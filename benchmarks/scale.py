"""The whole of GLM-4.5-Air through planner and reader: real names and shapes, sparse files, nothing kept.

    python benchmarks/scale.py tests/golden/glm4_5_air/config.json --gigabytes 220

The source files have their true sizes but hold no blocks on the disk (holes read as zeros); the converted checkpoint is
written to a null sink, so that only planning, reading, hashing and bookkeeping are measured. `--gigabytes N` reads the
first N GB of the jobs. Each part runs in this one process: the peak is the largest of all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from unittest import mock

import torch

from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.mcore import McoreTarget
from swiftlite.utils.io import format_bytes, peak_memory_bytes
from swiftlite.weights import stream
from swiftlite.weights.safetensors import create_shards, plan_shards, write_index
from swiftlite.weights.storage import Files, TensorSpec


def sparse_source(config: dict[str, object], directory: Path) -> int:
    """Headers, index and holes. Returns: bytes of all tensors."""
    bound = bind_map(config, with_mtp=True)
    specs = {
        name: TensorSpec(torch.float32 if entry.rule.keep_dtype else torch.bfloat16, entry.hf_shapes[position])
        for name, (entry, position) in bound.by_hf.items()
    }
    shards = plan_shards(specs, 5 * 10**9)
    create_shards(directory, shards)
    total = sum(spec.nbytes for spec in specs.values())
    write_index(directory, shards, total)
    (directory / "config.json").write_text(json.dumps(config))
    return total


class Clock:
    """Prints a line for what has happened since the last one."""

    def __init__(self) -> None:
        self.at = time.perf_counter()

    def line(self, what: str, nbytes: int = 0) -> None:
        seconds, self.at = time.perf_counter() - self.at, time.perf_counter()
        rate = f"{format_bytes(nbytes / seconds)}/s" if nbytes else ""
        print(f"{what:<44}{seconds:>8.2f} s {rate:>12}  peak {format_bytes(peak_memory_bytes())}", flush=True)
        self.at = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--gigabytes", type=float, default=float("inf"))
    parser.add_argument("--directory", type=Path, default=Path("/tmp/swiftlite-scale"))
    args = parser.parse_args()
    config, clock = json.loads(args.config.read_text()), Clock()
    print(f"start: peak {format_bytes(peak_memory_bytes())}")
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    try:
        total = sparse_source(config, args.directory)
        clock.line(f"sparse source of {format_bytes(total)}")
        plan = McoreTarget().plan(Checkpoint.open(args.directory))
        clock.line(f"headers read, {len(plan.source.names)} tensors planned")
        jobs, kept, size = plan.jobs(args.directory / "mcore"), [], 0
        clock.line(f"{len(jobs)} jobs in the order of the source")
        for job in jobs:
            if size < args.gigabytes * 1e9:
                kept.append(job)
                size += job.nbytes
        with mock.patch.object(Files, "write", lambda *_: None):
            hashes = stream.run(kept)
        clock.line(f"{format_bytes(size)} read, gathered, hashed, not written", size)
        assert set(hashes) == {name for job in kept for name in job.inputs}
        used = sum(p.stat().st_blocks * 512 for p in args.directory.iterdir())
        print(f"the source takes {format_bytes(used)} of disk")
    finally:
        shutil.rmtree(args.directory)


if __name__ == "__main__":
    main()
