"""Time and memory of `swiftlite export` both ways beside `cp` of the same files, each as a whole process.

    python benchmarks/convert.py --kind moe --gigabytes 3 --directory /tmp/bench

Page cache is dropped before every run where the system allows it (root), else the table says 'warm'. Start-up is a
process that only imports what the conversion needs; a rewrite loads every shard with safetensors and saves it again.
Columns: seconds of the process, seconds until the bytes are on the disk (sync), ratio to cp + sync of the same without
start-up, rate, largest resident memory of a process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

SWIFTLITE = [sys.executable, "-m", "swiftlite", "export"]
REWRITE = """
import sys, pathlib
from safetensors.torch import load_file, save_file
source, output = map(pathlib.Path, sys.argv[1:])
output.mkdir()
for shard in source.glob("*.safetensors"):
    save_file(load_file(shard), output / shard.name)
"""


def drop_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def run(command: list[str], output: Path, processes: int = 1) -> tuple[float, float, int]:
    """(seconds, seconds with sync, peak resident bytes of a process) of a command that writes `output`, removed first."""
    shutil.rmtree(output, ignore_errors=True)
    drop_cache()
    environment = {**os.environ, "NPROC_PER_NODE": str(processes)} if processes > 1 else None
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors}")
    os.sync()
    return seconds, time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("moe", "dense"), default="moe")
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/swiftlite-bench"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    source = args.directory / f"{args.kind}-{args.gigabytes:g}"
    # In a process of its own: a child's peak memory counts what its parent held when it was started.
    made = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(source), args.kind, str(args.gigabytes)]
    total = int(subprocess.run(made, capture_output=True, text=True, check=True).stdout)
    copy, mcore, back = (args.directory / name for name in ("copy", "mcore", "back"))
    shared = ["--model_type", {"moe": "glm4_5", "dense": "qwen3"}[args.kind], "--output_dir"]
    to_mcore = [*SWIFTLITE, "--model", str(source), "--to_mcore", "true", *shared, str(mcore)]
    to_hf = [*SWIFTLITE, "--mcore_model", str(mcore), "--to_hf", "true", *shared, str(back)]
    bitwise = ["--verify", "bitwise"]
    rows: list[tuple[str, list[str], Path, int]] = [
        ("cp", ["cp", "-r", str(source), str(copy)], copy, 1),
        ("safetensors rewrite", [sys.executable, "-c", REWRITE, str(source), str(copy)], copy, 1),
        ("start-up", [sys.executable, "-c", "import swiftlite.cli.export"], args.directory / "none", 1),
        ("to_mcore, verified", [*to_mcore, *bitwise], mcore, 1),
        ("to_mcore, 2 processes", to_mcore, mcore, 2),
        ("to_mcore", to_mcore, mcore, 1),
        ("to_hf, verified", [*to_hf, *bitwise], back, 1),
        ("to_hf, 2 processes", to_hf, back, 2),
        ("to_hf", to_hf, back, 1),
    ]
    print(f"{args.kind}, {total / 1e9:.2f} GB, cache {'dropped' if drop_cache() else 'warm'}, best of {args.repeats}")
    print(f"{'':<24}{'seconds':>9}{'+ sync':>9}{'ratio':>8}{'GB/s':>8}{'peak MB':>9}")
    base = startup = 0.0
    for name, command, output, processes in rows:
        runs = [run(command, output, processes) for _ in range(args.repeats)]
        seconds, synced, peak = (min(r[i] for r in runs) for i in range(3))
        if output == copy:
            shutil.rmtree(copy)
        if name == "start-up":
            startup = seconds
            print(f"{name:<24}{seconds:>9.2f}{synced:>9.2f}{'':>8}{'':>8}{peak / 1e6:>9.0f}", flush=True)
            continue
        base = base or synced
        net = synced - (startup if command[0] == sys.executable and output != copy else 0)
        row = f"{name:<24}{seconds:>9.2f}{synced:>9.2f}{net / base:>8.2f}{total / net / 1e9:>8.2f}{peak / 1e6:>9.0f}"
        print(row, flush=True)
    for shard in source.glob("*.safetensors"):
        subprocess.run(["cmp", str(shard), str(back / shard.name)], check=True)
    print("every shard of the way back is byte-equal to the source")


if __name__ == "__main__":
    main()
