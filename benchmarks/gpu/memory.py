"""Peak memory of training with and without each option that saves some, and the longest text that fits.

    python benchmarks/gpu/memory.py                        every row of one GPU; docs/memory.md shows its table
    python benchmarks/gpu/memory.py --rows "dense.*"       some rows
    python benchmarks/gpu/memory.py --rows ".*cp2.*" --length 65536 --most 262144    two GPUs share the text
    python benchmarks/gpu/memory.py --rows "moe plain" --held    what the memory is held by at the fullest moment
    python benchmarks/gpu/memory.py --tiny                 on a CPU, to see that it runs

Each trial is a process a GPU (a fork, so imports are paid once): three steps of one text of exactly that length.
Predicted is what the plan (`--dry_run true`) says without its allowance for CUDA; measured is what torch reserved, of which
`used` held tensors at the fullest moment. The longest text is looked for from the plan's answer for what the GPU is named
after (141 GB of an H200's 150) downwards.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swiftlite.plan.memory import MemoryUse

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not start CUDA here
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import held  # noqa: E402
import rows  # noqa: E402
from run import preload, rank_environment  # noqa: E402

WHOLE = ["--loss_chunk_size", str(1 << 40)]
OFFLOAD = ["--optimizer_cpu_offload", "true"]
MOMENTS = ["--use_precision_aware_optimizer", "true", "--exp_avg_dtype", "bf16", "--exp_avg_sq_dtype", "bf16"]
FULL = ["--recompute", "full"]
AWAY = ["--fine_grained_activation_offloading", "true", "--offload_modules", "attn_norm", "qkv_linear", "core_attn",
        "attn_proj", "mlp_norm"]  # fmt: skip
OPTIONS: dict[str, list[str]] = {
    "dense plain": WHOLE,
    "dense loss in chunks": [],
    "dense recompute mlp, layernorm": ["--recompute", "selective", "--recompute_modules", "mlp", "layernorm"],
    "dense recompute full": FULL,
    "dense activations on the host": AWAY,
    "dense optimizer on the host": OFFLOAD,
    "dense bf16 moments": MOMENTS,
    "dense fp8 blockwise": ["--fp8_format", "e4m3", "--fp8_recipe", "blockwise"],
    "dense full, optimizer on the host": [*FULL, *OFFLOAD],
    "moe plain": WHOLE,
    "moe loss in chunks": [],
    "moe recompute moe, layernorm": ["--recompute", "selective", "--recompute_modules", "moe", "layernorm"],
    "moe recompute full": FULL,
    "moe full, optimizer on the host": [*FULL, *OFFLOAD],
}
CP2 = ["--context_parallel_size", "2"]
OPTIONS |= {name.replace(" ", " cp2 ", 1): [*flags, *CP2] for name, flags in OPTIONS.items()}
STEP = 1024  # lengths are multiples of it


def gpus_of(name: str) -> int:
    return 2 if " cp2 " in name else 1


def words_of(name: str, length: int, args: argparse.Namespace, steps: int = 3) -> list[str]:
    model = name.split()[0]
    return [
        "--model", str(args.directory / model), "--model_type", rows.CONFIGS[model][1], "--template", "chatml",
        "--dataset", str(args.directory / f"{length}.jsonl"), "--train_iters", str(steps), "--global_batch_size", "1",
        "--micro_batch_size", "1", "--lr", "1e-5", "--max_length", str(length), "--truncation_strategy", "right",
        "--save_weights_only", "true", "--report_to", "none", "--cuda_graph", "false",
        "--output_dir", str(args.directory / "run"), *OPTIONS[name],
    ]  # fmt: skip


def predicted(name: str, length: int, args: argparse.Namespace) -> MemoryUse:
    """What the plan expects on each GPU."""
    import torch

    from swiftlite.arguments.megatron_train import MegatronSftArguments
    from swiftlite.arguments.parser import parse
    from swiftlite.checkpoint.bind import bind_map, convert_hf_config
    from swiftlite.plan.layouts import own_layout
    from swiftlite.plan.memory import TrainingModel

    config = json.loads((args.directory / name.split()[0] / "config.json").read_text())
    words = parse(MegatronSftArguments, words_of(name, length, args))
    words.apply_model_config(convert_hf_config(config))
    model = TrainingModel(bind_map(config), words, torch.bfloat16)
    return model.need(own_layout(words, gpus_of(name)), 1, length, 1)


def child(name: str, length: int, args: argparse.Namespace, steps: int, rank: int, gpus: int) -> None:
    os.environ.update(rank_environment(rank, gpus, args.port))
    log = os.open(args.directory / f"log.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    out = os.dup(1)
    os.dup2(log, 1), os.dup2(log, 2)
    import torch

    from swiftlite import megatron_sft_main
    from swiftlite.megatron.trainers.base import Trainer
    from swiftlite.train.intervals import Intervals

    Intervals.saves = lambda *_: False  # type: ignore[method-assign]
    if args.held and rank == 0:
        usual, numbers = Trainer.step, itertools.count()

        def step(self: Trainer) -> object:
            if next(numbers) != 1:  # the first step makes the optimizer's states
                return usual(self)
            with open(out, "w") as file, contextlib.redirect_stdout(file):
                return held.recorded(lambda: usual(self), f"{name} at {length}")

        Trainer.step = step  # type: ignore[assignment,method-assign]
    try:
        line = megatron_sft_main(words_of(name, length, args, steps))
        gpu = torch.cuda.is_available()
        peak, used = (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()) if gpu else (0, 0)
        found = {"peak": peak, "used": used, "loss": line.get("loss"), "step_s": line.get("step_s")}
        (args.directory / f"result.{rank}").write_text(json.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def trial(name: str, length: int, args: argparse.Namespace, steps: int = 3) -> dict[str, float] | None:
    """What the steps of that length took on the fullest GPU, None if they do not fit; says why they fail otherwise."""
    gpus, data = gpus_of(name), args.directory / f"{length}.jsonl"
    if not data.exists():
        rows.make_data("fixed", data, length, 1)
    shutil.rmtree(args.directory / "run", ignore_errors=True)
    results, logs = ([args.directory / f"{kind}.{rank}" for rank in range(gpus)] for kind in ("result", "log"))
    for file in results:
        file.unlink(missing_ok=True)
    args.port += 1
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=child, args=(name, length, args, steps, rank, gpus)) for rank in range(gpus)]
    for process in processes:
        process.start()
    limit = time.time() + args.trial_seconds
    while any(process.is_alive() for process in processes):
        if time.time() > limit or any(process.exitcode for process in processes):  # the others would wait for that rank
            for process in processes:
                process.kill()
        time.sleep(0.1)
    if all(file.exists() for file in results):
        found = [json.loads(file.read_text()) for file in results]
        return dict(max(found, key=lambda line: line["peak"]))
    text = "\n".join(log.read_text(errors="replace").strip() for log in logs)
    if not re.search(r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED", text):
        print(f"{name} at {length}: " + "\n  ".join(text.splitlines()[-args.log_lines :]), flush=True)
    return None


def longest(name: str, memory: int, args: argparse.Namespace) -> tuple[int, int]:
    """(longest length of which the plan says that it fits, the first that does of it and of what is an eighth less)."""
    length, too_long = STEP, args.most + STEP
    while too_long - length > STEP:
        middle = (length + too_long) // 2 // STEP * STEP
        fits_there = predicted(name, middle, args).total <= memory
        length, too_long = (middle, too_long) if fits_there else (length, middle)
    expected = length
    for _ in range(args.trials):
        if time.time() > args.deadline:
            break
        if trial(name, length, args, steps=2) is not None:  # the second step has the optimizer's states
            return expected, length
        length = length * 7 // 8 // STEP * STEP
    return expected, 0


def device_bytes() -> int:
    """What the GPU is named after, 141 GB of 150. Asked for in another process: a fork of one that has started CUDA cannot
    use it."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    return int(int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) * 0.94)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="(?!.* cp2 ).*", help="regular expression of row names")
    parser.add_argument("--length", type=int, default=16384, help="at which peaks are compared")
    parser.add_argument("--longest", default=".*", help="rows whose longest length is looked for")
    parser.add_argument("--most", type=int, default=1 << 17, help="longest length that is tried")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--held", action="store_true", help="print what each trial's memory was held by")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--seconds", type=float, default=560, help="start no trial after so long")
    parser.add_argument("--trial_seconds", type=float, default=90)
    parser.add_argument("--log_lines", type=int, default=8, help="of a failed trial")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm/swiftlite-memory"))
    args = parser.parse_args()
    args.deadline, args.port = time.time() + args.seconds, 29600 + os.getpid() % 1000
    memory = 10**9 if args.tiny else device_bytes()
    args.directory.mkdir(parents=True, exist_ok=True)
    names = [name for name in OPTIONS if re.fullmatch(args.rows, name)]
    makers = []
    for model in sorted({name.split()[0] for name in names}):
        config, kind = rows.CONFIGS[model]
        rows.CONFIGS[model] = ({**config, "max_position_embeddings": 1 << 21}, kind)
        if not (args.directory / model).exists():
            work = (model, args.directory / model, args.tiny)
            makers.append(multiprocessing.get_context("fork").Process(target=rows.make_model, args=work))
            makers[-1].start()
    preload()
    for maker in makers:
        maker.join()
    print(
        f"{'':<36}{'GB at ' + str(args.length):>14}{'used':>8}{'plan':>8}{'step s':>8}{'longest':>10}{'plan':>10}",
        flush=True,
    )
    for name in names:
        if time.time() > args.deadline:
            print(f"{name:<36}no time left", flush=True)
            continue
        found = trial(name, args.length, args)
        peak = f"{found['peak'] / 1e9:.1f}" if found else "no room"
        seconds = f"{found['step_s']:.2f}" if found and found["step_s"] else ""
        used = f"{found['used'] / 1e9:.1f}" if found else ""
        plan = predicted(name, args.length, args)
        line = f"{name:<36}{peak:>14}{used:>8}{(plan.total - plan.overhead) / 1e9:>8.1f}{seconds:>8}"
        if re.fullmatch(args.longest, name) and not args.tiny:
            expected, fits = longest(name, memory, args)
            line += f"{fits:>10}{expected:>10}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
