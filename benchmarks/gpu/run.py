"""All of swiftlite's training speeds on GPUs in one table, one command.

    python benchmarks/gpu/run.py                                  every row that the machine's GPUs can run
    python benchmarks/gpu/run.py --rows "moe.*" --profile         some rows; what their time goes to
    python benchmarks/gpu/run.py --rows ".*(long|fp8).*"          FP8 beside bf16, 50 steps each
    python benchmarks/gpu/run.py --tiny --rows "dense mb1"        on a CPU, to see that it runs

Each row is a process of its own (a fork of this one, so imports are paid once); rows of one GPU run side by side on the
GPUs there are, rows of two after them. Columns are medians over the steps after the warm-up: seconds of a step,
tokens/s, MFU (operations that the model needs), time of the compared row over this one's, the most memory of the
device, losses of the first steps. Compare only within one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not start CUDA here

from rows import BATCH, CONFIGS, LENGTH, ROWS, Row, make_data, make_model  # noqa: E402


def words_of(row: Row, args: argparse.Namespace, steps: int) -> list[str]:
    length = LENGTH // 16 if args.tiny else LENGTH
    data = args.directory / f"{row.data}-{length}.jsonl"
    most = length // 2 if row.data == "pairs" else length
    words = ["--model", str(args.directory / row.model), "--model_type", CONFIGS[row.model][1], "--template", "chatml"]
    words += [
        "--dataset",
        str(data),
        "--train_iters",
        str(steps),
        "--global_batch_size",
        str(row.batch),
        "--lr",
        "1e-5",
    ]
    words += ["--max_length", str(most), "--truncation_strategy", "right", "--logging_steps", "1"]
    words += ["--save_weights_only", "true", "--report_to", "none", "--output_dir", str(args.directory / slug(row))]
    return [*words, *row.flags]


def slug(row: Row) -> str:
    return row.name.replace(" ", "-")


def run(row: Row, args: argparse.Namespace) -> list[dict[str, float]]:
    """In the row's process. Returns: log lines, one a step."""
    steps = row.warm_up + row.steps
    words = words_of(row, args, steps)
    if row.side == "bare":
        from bare import losses

        return losses(CONFIGS[row.model][0], int(row.flags[1]), LENGTH, BATCH, steps)
    if row.side == "loop":
        from bare import transformers_losses

        return transformers_losses(str(args.directory / row.model), int(row.flags[1]), LENGTH, BATCH, steps)
    from swiftlite import dpo_main, megatron_dpo_main, megatron_sft_main, sft_main
    from swiftlite.train.intervals import Intervals
    from swiftlite.train.plot import read_run

    Intervals.saves = lambda *_: False  # type: ignore[method-assign]
    mains = {("megatron", "sft"): megatron_sft_main, ("transformers", "sft"): sft_main,
             ("megatron", "dpo"): megatron_dpo_main, ("transformers", "dpo"): dpo_main}  # fmt: skip
    with profiled(row, args):
        mains[row.side, row.kind](words)
    return [line for line in read_run(args.directory / slug(row)) if "step_s" in line]


@contextlib.contextmanager
def profiled(row: Row, args: argparse.Namespace) -> Any:
    """Record two steps after the warm-up of a Megatron row and print where their time went."""
    if not re.fullmatch(args.profile, row.name) or row.side != "megatron" or int(os.environ.get("RANK", 0)):
        yield
        return
    import torch
    from profile_steps import report

    from swiftlite.megatron.trainers.base import Trainer

    usual, done, first = Trainer.step, [0], row.warm_up + max(row.steps - 2, 0)
    record = torch.profiler.profile()

    def step(self: Any) -> Any:
        if done[0] == first:
            record.__enter__()
        result = usual(self)
        done[0] += 1
        if done[0] == row.warm_up + row.steps:
            record.__exit__(None, None, None)
            report(row.name, record)
        return result

    Trainer.step = step  # type: ignore[method-assign]
    yield


def child(row: Row, args: argparse.Namespace, environment: dict[str, str], result: Path) -> None:
    os.environ.update(environment)
    log = os.open(result.with_suffix(f".{environment.get('RANK', 0)}.log"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    out = os.dup(1)
    os.dup2(log, 1), os.dup2(log, 2)
    if re.fullmatch(args.profile, row.name):
        os.dup2(out, 1)
    lines = run(row, args)
    if environment.get("RANK", "0") == "0":
        result.write_text(json.dumps(lines))
    sys.stdout.flush()
    os._exit(0)  # process groups and graphs need no tidy end


@dataclass
class Running:
    """A row's processes on their GPUs, to be killed at `limit`."""

    row: Row
    gpus: list[int]
    processes: list[Any]
    result: Path
    limit: float

    def ended(self) -> bool:
        if time.time() > self.limit:
            for process in self.processes:
                process.kill()
        return not any(process.is_alive() for process in self.processes)


def rank_environment(rank: int, gpus: int, port: int) -> dict[str, str]:
    """What torchrun would tell one of several processes; nothing for one alone."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": gpus,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return {key: str(value) for key, value in ranks.items()} if gpus > 1 else {}


def start(row: Row, args: argparse.Namespace, gpus: list[int], port: int) -> Running:
    fork = multiprocessing.get_context("fork")
    shutil.rmtree(args.directory / slug(row), ignore_errors=True)
    result = args.directory / f"{slug(row)}.json"
    result.unlink(missing_ok=True)
    common = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), **row.environment}
    processes = []
    for rank in range(row.gpus):
        environment = common | rank_environment(rank, row.gpus, port)
        processes.append(fork.Process(target=child, args=(row, args, environment, result)))
    for process in processes:
        process.start()
    return Running(row, gpus, processes, result, min(time.time() + args.row_seconds, args.deadline))


def finish(run: Running, args: argparse.Namespace) -> list[dict[str, float]] | None:
    """Say how an ended row went. Returns: its log lines, None if it failed."""
    shutil.rmtree(args.directory / slug(run.row), ignore_errors=True)
    log = run.result.with_suffix(".0.log").read_text(errors="replace").strip().splitlines()
    if not run.result.exists():
        print(f"{run.row.name}: failed\n  " + "\n  ".join(log[-args.log_lines :]), flush=True)
        return None
    lines = list(json.loads(run.result.read_text()))
    steps = " ".join(f"{line['step_s']:.2f}" for line in lines)
    print(f"{run.row.name}: {steps}", flush=True)
    if args.show:
        print("\n".join(f"    {line}" for line in log if re.search(args.show, line)), flush=True)
    return lines


def run_all(rows: list[Row], gpus: int, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Each row as soon as it has its GPUs, those of one GPU first."""
    found: dict[str, list[dict[str, float]]] = {}
    queue = sorted(rows, key=lambda row: row.gpus)
    free, running = set(range(gpus)), list[Running]()
    while queue or running:
        for run in [run for run in running if run.ended()]:
            running.remove(run)
            free.update(run.gpus)
            if lines := finish(run, args):
                found[run.row.name] = lines
        if time.time() > args.deadline - 15:
            queue = []
        while queue and queue[0].gpus <= len(free):
            row = queue.pop(0)
            taken = sorted(free)[: row.gpus]
            free.difference_update(taken)
            running.append(start(row, args, taken, 29500 + len(found) + taken[0]))
        time.sleep(0.2)
    return found


def table(found: dict[str, list[dict[str, float]]], rows: Sequence[Row] = ROWS) -> None:
    seconds = {
        row.name: statistics.median(line["step_s"] for line in found[row.name][row.warm_up :])
        for row in rows if row.name in found
    }  # fmt: skip
    print(f"{'':<28}{'step s':>8}{'tokens/s':>10}{'MFU %':>7}{'faster than':>22}{'GiB':>6}  losses")
    for row in rows:
        if row.name not in found:
            continue
        lines = found[row.name][row.warm_up :]
        tokens, mfu, memory = (
            statistics.median(line.get(name, 0.0) for line in lines)
            for name in ("tokens_per_second", "mfu", "memory_gib")
        )
        beside = f"{row.beside} {seconds[row.beside] / seconds[row.name]:.2f}x" if row.beside in seconds else ""
        losses = " ".join(f"{line['loss']:.3f}" for line in found[row.name][:4])
        if row.steps > 40:
            losses += " .. " + " ".join(f"{line['loss']:.3f}" for line in found[row.name][-3:])
        print(
            f"{row.name:<28}{seconds[row.name]:>8.3f}{tokens:>10.0f}{100 * mfu:>7.1f}{beside:>22}{memory:>6.1f}  {losses}"
        )


def versions() -> str:
    from importlib.metadata import version

    names = ("torch", "megatron-core", "transformer-engine", "transformers", "peft", "triton")
    parts = []
    for name in names:
        with contextlib.suppress(Exception):
            parts.append(f"{name} {version(name)}")
    return ", ".join(parts)


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows",
        default="(?!.*(long|fp8)).*",
        help="regular expression of row names; default: all but FP8's of 50 steps",
    )
    parser.add_argument(
        "--profile", nargs="?", const=".*", default="", metavar="ROWS",
        help="busy share, largest kernels and longest waits of Megatron rows (regular expression; default: all)",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny models in fp32, for a CPU")
    parser.add_argument("--seconds", type=float, default=540, help="start no row after so long; stop what runs then")
    parser.add_argument("--row_seconds", type=float, default=120)
    parser.add_argument("--log_lines", type=int, default=12, help="of a failed row")
    parser.add_argument("--show", help="regular expression of log lines to print of each row")
    shared = Path("/dev/shm")
    parser.add_argument(
        "--directory", type=Path, default=(shared if shared.is_dir() else Path("/tmp")) / "swiftlite-gpu"
    )
    return parser


def prepare(rows: Sequence[Row], args: argparse.Namespace) -> int:
    """Make models and data of the rows and import what they need. Returns: tokens of a sample."""
    args.deadline = time.time() + args.seconds
    args.directory.mkdir(parents=True, exist_ok=True)
    length = LENGTH // 16 if args.tiny else LENGTH
    for kind in {row.data for row in rows}:
        make_data(kind, args.directory / f"{kind}-{length}.jsonl", length, 24)
    fork = multiprocessing.get_context("fork")
    makers = [
        fork.Process(target=make_model, args=(name, args.directory / name, args.tiny))
        for name in {row.model for row in rows} if not (args.directory / name).exists()
    ]  # fmt: skip
    for maker in makers:
        maker.start()
    preload()
    for maker in makers:
        maker.join()
    print(f"ready after {time.time() + args.seconds - args.deadline:.0f} s", flush=True)
    return length


def report(
    found: dict[str, list[dict[str, float]]], gpus: int, batch: int, length: int, rows: Sequence[Row] = ROWS
) -> None:
    import torch

    cards = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(i) for i in range(cards)} or {"CPU"}
    print(f"\n{gpus} x {', '.join(names)}; {versions()}; {batch} samples of {length} tokens a step")
    table(found, rows)


def main() -> None:
    args = options(__doc__).parse_args()
    import torch

    gpus = torch.cuda.device_count() or 1
    rows = [row for row in ROWS if re.fullmatch(args.rows, row.name) and row.gpus <= gpus]
    length = prepare(rows, args)
    report(run_all(rows, gpus, args), gpus, BATCH, length)


def preload() -> None:
    """Import what every row needs, unless that starts CUDA: a fork of such a process cannot use it."""
    probe = multiprocessing.get_context("fork").Process(target=_imports_start_cuda)
    probe.start()
    probe.join()
    if probe.exitcode == 0:
        _imports()
    else:
        print("rows import for themselves: an import starts CUDA", flush=True)


def _imports() -> None:
    import importlib

    for name in ("transformers", "swiftlite.llm.train.sft", "swiftlite.llm.train.dpo", "peft", "megatron.core",
                 "transformer_engine.pytorch", "swiftlite.megatron.trainers.dpo"):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _imports_start_cuda() -> None:
    import torch

    _imports()
    os._exit(int(torch.cuda.is_initialized()))


if __name__ == "__main__":
    main()
