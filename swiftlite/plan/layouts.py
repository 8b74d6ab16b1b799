"""The layouts that `--dry_run true` offers: a table of those that fit the GPUs, and the command of the first one."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace

from swiftlite.arguments.export import ExportArguments, PlanArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import as_words
from swiftlite.arguments.pipeline import chunk_layers
from swiftlite.plan.memory import GPUS_PER_NODE, Layout, MemoryUse, TrainingModel
from swiftlite.utils.dist import num_processes
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import format_bytes
from swiftlite.utils.secrets import SETTINGS

MODES = (None, "selective", "full")
_OWN = {"dry_run", "gpus", "gpu_memory", "debug"}


def command(words: Sequence[str], args: PlanArguments, without: Collection[str] = ()) -> list[str]:
    """What was typed, as words, without the flags of the plan and without access tokens."""
    return [*words, *as_words(args, _OWN.union(without, SETTINGS))]


def own_layout(args: MegatronSftArguments, gpus: int) -> Layout:
    """The layout that the flags ask for. Raises: UsageError if it does not fit the number of GPUs."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep = args.expert_model_parallel_size
    stages = chunk_layers(args, args.description.num_layers)
    dp = args.data_parallel_size(gpus)
    etp = args.expert_tensor_parallel_size or tp
    chunks = args.num_virtual_stages_per_pipeline_rank or 1
    cp = args.context_parallel_size
    return Layout(tp, pp, ep, etp, dp, cp, stages, args.recompute_granularity, bool(args.sequence_parallel), chunks)


def print_layouts(args: ExportArguments | MegatronSftArguments, model: TrainingModel, words: Sequence[str]) -> None:
    """A table of layouts that fit the GPUs and the command of the first one; of a training, the one that its flags ask for.

    words: flags of `swiftlite megatron sft` that the command begins with.
    """
    gpus = args.gpus or num_processes()
    micro = model.args.micro_batch_size
    own = args if isinstance(args, MegatronSftArguments) else None
    length = int((model.args.seq_length if own else args.max_length) or 0)
    batch = model.args.global_batch_size or gpus * micro * (model.args.gradient_accumulation_steps or 1)
    print(f"\ntraining on {gpus} GPUs of {args.gpu_memory}: {micro * model.sequences} x {length} tokens at a time, "
          f"global batch {batch}; GB on the fullest GPU, with flash attention, 3 GB for CUDA and NCCL included")  # fmt: skip
    print(f"{'TP':>3}{'PP':>4}{'CP':>4}{'EP':>4}{'ETP':>4}{'DP':>4} {'recompute':<10}{'weights':>9}{'grads':>8}{'optim':>8}"
          f"{'activ':>8}{'total':>8}")  # fmt: skip
    if own and _print_own(own, model, gpus, micro, length):
        return
    found = model.fitting(gpus, args.gpu_memory_bytes, micro, length, batch)
    for layout, need in found[:8]:
        _print_layout(layout, need)
    if found:
        data = [] if "--dataset" in words else ["--dataset", "FILE"]
        name = own.COMMAND if own else "megatron sft"
        _print_command(gpus, ["swiftlite", *name.split(), *words, *data, *found[0][0].flags()])
        return
    layout, need = model.smallest(gpus, micro, length, max(batch // micro, 1))
    _print_layout(layout, need)
    print(f"no layout fits: the smallest takes {format_bytes(need.total)} a GPU; {_enough(args, model, gpus, length)}")


def _print_own(args: MegatronSftArguments, model: TrainingModel, gpus: int, micro: int, length: int) -> bool:
    """The layout that the flags ask for, by recompute mode, and the command. Returns: whether it fits."""
    try:
        layout = own_layout(args, gpus)
        micro, accumulated, _ = args.batch_sizes(layout.dp)
    except UsageError as error:
        print(f"your flags: {error}")
        return False
    needs = {mode: model.need(replace(layout, recompute=mode), micro, length, accumulated) for mode in MODES}
    for mode, need in needs.items():
        _print_layout(replace(layout, recompute=mode), need, "<- your flags" if mode == layout.recompute else "")
    if host := needs[layout.recompute].host:
        print(f"beside it {format_bytes(host)} of host memory for each GPU")
    fits: bool = needs[layout.recompute].total <= args.gpu_memory_bytes
    if fits:
        _print_command(gpus, command(["swiftlite", *args.COMMAND.split()], args))
    else:
        print(f"your flags need {format_bytes(needs[layout.recompute].total)} a GPU; what fits:")
    return fits


def _enough(args: PlanArguments, model: TrainingModel, gpus: int, length: int) -> str:
    """The first doubling of the GPUs with which something fits."""
    for _ in range(8):
        gpus *= 2
        if model.fitting(gpus, args.gpu_memory_bytes, model.args.micro_batch_size, length, gpus):
            return f"{gpus} GPUs of {args.gpu_memory} are enough"
    return "use larger GPUs or a shorter --max_length"


def _print_layout(layout: Layout, need: MemoryUse, note: str = "") -> None:
    parts = (need.weights, need.gradients, need.optimizer, need.activations, need.total)
    sizes = "".join(f"{part / 1e9:>{width}.1f}" for part, width in zip(parts, (9, 8, 8, 8, 8), strict=True))
    print(f"{layout.tp:>3}{layout.pp:>4}{layout.cp:>4}{layout.ep:>4}{layout.etp:>4}{layout.dp:>4} "
          f"{layout.recompute or 'none':<10}{sizes} {note}".rstrip())  # fmt: skip


def _print_command(gpus: int, words: Sequence[str]) -> None:
    environment = f"NPROC_PER_NODE={min(gpus, GPUS_PER_NODE)}"
    if gpus > GPUS_PER_NODE:
        environment = f"NNODES={gpus // GPUS_PER_NODE} NODE_RANK=0.. MASTER_ADDR=HOST {environment}"
    print(f"command     {environment} {shlex.join(words)}")
