"""One mixture of experts under the layouts of 1, 2, 4 ... N GPUs of one host: speed, files, resuming.

    python benchmarks/gpu/layouts.py 8                         on 8 GPUs: all parts
    python benchmarks/gpu/layouts.py 8 --parts training        one of training, files, resume
    python benchmarks/gpu/layouts.py 4 --tiny                  on a CPU (gloo), to see that it runs

training: the same 16 samples a step under each layout. Losses agree within the noise of bf16; `scales` is the time on one
GPU over GPUs times this one's.
files: all ranks load the safetensors files and save them again, each its share; N processes convert them to torch_dist.
GB/s of the whole model, bytes that a rank read beside its own weights'.
resume: steps 5 and 6 after a checkpoint of N GPUs, on N, N / 2 and N / 4 of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import run  # noqa: E402
from rows import Row, layouts  # noqa: E402

STEPS_BEFORE = 4


def training(rows: list[Row], args: SimpleNamespace) -> None:
    length = run.prepare(rows, args)
    found = run.run_all(rows, args.gpus, args)
    run.report(found, args.gpus, rows[0].batch, length, rows)
    medians = [
        (row, statistics.median(line["step_s"] for line in found[row.name][row.warm_up :]))
        for row in rows
        if row.name in found
    ]
    one = next((seconds for row, seconds in medians if row.gpus == 1), None)
    for row, seconds in medians:
        if one and row.gpus > 1:
            print(f"{row.name}: scales {one / (row.gpus * seconds):.0%}")


def launch(gpus: int, words: list[str]) -> float:
    """Seconds of `words` as one process a GPU."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    started = time.perf_counter()
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True)
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("  ")), flush=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def files(args: SimpleNamespace) -> None:
    model = args.directory / "air"
    size = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9
    print(f"\n{args.gpus} ranks, {size:.2f} GB of safetensors")
    launch(args.gpus, [__file__, str(args.gpus), "--worker", "--directory", str(args.directory)])
    for processes in (1, args.gpus):
        shutil.rmtree(args.directory / "converted", ignore_errors=True)
        words = ["-m", "swiftlite", "export", "--model", str(model), "--model_type", "glm4_5", "--to_mcore", "true"]
        started = time.perf_counter()
        environment = {**os.environ, **({"NPROC_PER_NODE": str(processes)} if processes > 1 else {})}
        command = [sys.executable, *words, "--output_dir", str(args.directory / "converted")]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        taken = time.perf_counter() - started
        print(f"  conversion, {processes} processes: {taken:.1f} s with start-up, {size / taken:.2f} GB/s")
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(args.directory / "copy")], check=True)
    taken = time.perf_counter() - started
    print(f"  cp: {taken:.1f} s, {size / taken:.2f} GB/s", flush=True)
    for name in ("converted", "copy", "saved"):
        shutil.rmtree(args.directory / name, ignore_errors=True)


def worker(directory: Path) -> None:
    """On every rank: load all experts over the ranks, save them again."""
    import torch

    from swiftlite.arguments.megatron_export import conversion_arguments
    from swiftlite.checkpoint.bind import convert_hf_config
    from swiftlite.checkpoint.info import read_config
    from swiftlite.megatron.distributed import destroy, initialize
    from swiftlite.megatron.hf_io import load_weights, save_hf_weights
    from swiftlite.megatron.model.provider import build_models

    source = directory / "air"
    args = conversion_arguments(convert_hf_config(read_config(source)), str(source), "bfloat16")
    args.expert_model_parallel_size = int(os.environ["WORLD_SIZE"])
    args.use_cpu_initialization = not torch.cuda.is_available()
    initialize(args)
    models = build_models(args)
    own = sum(p.numel() * p.element_size() for model in models for p in model.parameters()) / 1e9
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e9
    started = time.perf_counter()
    read = load_weights(models, source) / 1e9
    torch.distributed.barrier()
    loaded = time.perf_counter() - started
    save_hf_weights(models, directory / "saved", source)
    torch.distributed.barrier()
    saved = time.perf_counter() - started - loaded
    if os.environ["RANK"] == "0":
        print(
            f"  load: {loaded:.1f} s, {size / loaded:.2f} GB/s; rank 0 read {read:.2f} GB, its weights are {own:.2f} GB"
        )
        print(f"  save: {saved:.1f} s, {size / saved:.2f} GB/s", flush=True)
    destroy()


def resume(rows: list[Row], args: SimpleNamespace) -> None:
    """Losses of steps after a checkpoint of all GPUs, on fewer of them."""
    whole = next(row for row in reversed(rows) if "tp2" in row.name or row.gpus == args.gpus)
    start = args.directory / "resume"
    shutil.rmtree(start, ignore_errors=True)
    fewer = ["air dp1" if gpus == 1 else f"air ep{gpus}" for gpus in (args.gpus // 2, args.gpus // 4)]
    print(f"\nresume: {STEPS_BEFORE} steps of {whole.name}, then two more")
    _train(whole, STEPS_BEFORE, start, args)
    for row in (whole, *(row for row in rows if row.name in fewer)):
        copy = args.directory / "resumed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(start, copy)
        _train(row, STEPS_BEFORE + 2, copy, args)
        lines = [json.loads(line) for line in (copy / "logging.jsonl").read_text().splitlines()]
        losses = [f"{line['loss']:.4f}" for line in lines if "loss" in line][-2:]
        print(f"  {row.gpus} GPUs, {row.name}: losses {' '.join(losses)}", flush=True)


def _train(row: Row, steps: int, output: Path, args: SimpleNamespace) -> None:
    words = run.words_of(row, args, steps)
    for flag, value in (("--save_weights_only", "false"), ("--output_dir", str(output))):
        words[words.index(flag) + 1] = value
    resumed = ["--extend", "true"] if output.exists() else []
    launch(row.gpus, ["-m", "swiftlite", "megatron", "sft", *words, *resumed, "--save_steps", str(STEPS_BEFORE)])


def main() -> None:
    parser = run.options(__doc__)
    parser.add_argument("gpus", type=int)
    parser.add_argument("--parts", nargs="+", default=["training", "files", "resume"])
    parser.add_argument("--worker", action="store_true", help="one rank of `files`")
    args = parser.parse_args()
    if args.worker:
        return worker(args.directory)
    rows = [row for row in layouts(args.gpus) if re.fullmatch(args.rows, row.name)]
    if "training" in args.parts:
        training(rows, args)
    else:
        run.prepare(rows, args)
    if "files" in args.parts:
        files(args)
    if "resume" in args.parts:
        resume(rows, args)


if __name__ == "__main__":
    main()
