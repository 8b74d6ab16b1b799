"""Peak memory of `swiftlite export` against the size of the model: one process each, as its own summary says.

    python benchmarks/memory.py --gigabytes 1 3 7

The source is a GLM-4.5-style MoE of sparse files (zeros that take no disk); what is written is real, and deleted after
each size. The way back runs where both together stay within --disk GB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from synthetic import make_checkpoint


def export(*words: str) -> tuple[str, float]:
    """(measured peak memory, seconds) of one export."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "swiftlite", "export", *words], capture_output=True, text=True)
    found = re.search(r"measured peak memory (.*)", done.stderr)
    if done.returncode or not found:
        raise SystemExit(done.stderr)
    return found[1], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 3, 7])
    parser.add_argument("--disk", type=float, default=8)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/swiftlite-memory"))
    args = parser.parse_args()
    for gigabytes in args.gigabytes:
        hf, mcore, back = (args.directory / name for name in ("hf", "mcore", "back"))
        shutil.rmtree(args.directory, ignore_errors=True)
        try:
            make_checkpoint(hf, "moe", gigabytes, sparse=True)
            peak, seconds = export("--model", str(hf), "--model_type", "glm4_5", "--to_mcore", "true",
                                   "--output_dir", str(mcore))  # fmt: skip
            print(f"{gigabytes:g} GB to_mcore: peak {peak}, {seconds:.1f} s", flush=True)
            if 2 * gigabytes <= args.disk:
                peak, seconds = export("--mcore_model", str(mcore), "--to_hf", "true", "--output_dir", str(back))
                print(f"{gigabytes:g} GB to_hf: peak {peak}, {seconds:.1f} s", flush=True)
        finally:
            shutil.rmtree(args.directory, ignore_errors=True)


if __name__ == "__main__":
    main()
