"""What `--dry_run true` prints: bytes, files, memory, time, layouts that fit, the command to type. Writes nothing."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swiftlite.arguments.parser import as_words
from swiftlite.arguments.preference import PreferenceArguments
from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.planned import PlannedSource
from swiftlite.checkpoint.vocabulary import grown
from swiftlite.convert.targets import McorePlan, Plan
from swiftlite.plan.memory import GPUS_PER_NODE, Layout, MemoryUse, TrainingModel, even_stages
from swiftlite.utils.dist import num_processes
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import existing_parent, format_bytes, peak_memory_bytes, probe_disk
from swiftlite.utils.secrets import SETTINGS
from swiftlite.utils.text import format_seconds, printable
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.storage import TensorSpec
from swiftlite.weights.stream import planned_bytes

MODES = (None, "selective", "full")
_OWN = {"dry_run", "gpus", "gpu_memory", "debug"}
_PARALLEL = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "sequence_parallel", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "num_virtual_stages_per_pipeline_rank", "recompute", "recompute_granularity",
    "recompute_method", "recompute_num_layers", "recompute_modules",
}  # fmt: skip


def command(words: Sequence[str], args: Any, without: Collection[str] = ()) -> list[str]:
    """What was typed, as words, without the flags of the plan and without access tokens."""
    return [*words, *as_words(args, _OWN.union(without, SETTINGS))]


def _rows(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<12}{text}")


# ---- conversion ----


def print_coverage(plan: McorePlan) -> None:
    """Print the plan per rule: Megatron name <- HF names, shape, dtype, bytes; then what is left out and why."""
    bound = plan.source.bound
    for entry in bound.entries:
        if entry.expert:
            continue
        dtype = plan.dtypes[entry.mcore, entry.expert]
        experts = 1 if entry.expert is None else bound.model.experts
        spec = TensorSpec(dtype, entry.shape)
        print(
            f"{entry.label} <- {' + '.join(entry.hf)} {type(entry.rule.op).__name__} "
            f"{list(entry.shape)} {str(dtype).removeprefix('torch.')} {format_bytes(spec.nbytes)}"
            f"{f', and so {experts - 1} more experts' if experts > 1 else ''}"
        )
    for name in plan.source.ignored:
        print(printable(f"ignored: {name} (not a weight)"))
    for name, of in plan.source.copies.items():
        print(printable(f"left out: {name} (copy of {of})"))


def print_conversion(args: Any, output_dir: Path, plan: Plan) -> None:
    """Bytes, files, memory, time and command of a conversion."""
    total, files = plan.total_bytes, plan.sizes
    source = plan.source.source
    read = source.stored_bytes if isinstance(source, PlannedSource) else total
    speed = probe_disk(output_dir)
    rows = [
        ("reads", format_bytes(read)),
        ("writes", f"{format_bytes(total)} in {len(files)} files, the largest {format_bytes(max(files))}"),
        ("memory", f"{format_bytes(peak_memory_bytes() + planned_bytes(args.max_memory_bytes))} at most, of which the "
                   f"program itself takes {format_bytes(peak_memory_bytes())}"),
        ("disk", _disk(output_dir, total, speed)),
    ]  # fmt: skip
    if speed is not None:
        seconds = read / speed.read + total / speed.write
        text = f"about {format_seconds(seconds)}"
        if args.verify != "bitwise":
            text += f"; --verify bitwise adds about {format_seconds(total / speed.read)}"
        else:
            text = f"about {format_seconds(seconds + total / speed.read)} with --verify bitwise"
        rows.append(("time", f"{text}, if the disk keeps up that speed"))
    rows.append(("command", shlex.join(command(["swiftlite", "export"], args))))
    _rows(rows)


def _disk(directory: Path, total: int, speed: Any) -> str:
    free = shutil.disk_usage(existing_parent(directory)).free
    text = f"{format_bytes(free)} free" + ("" if total <= free else f": {format_bytes(total - free)} too little")
    if speed is None:
        return f"{text}; it cannot be written, so its speed is not known"
    return f"{text}; reads {format_bytes(speed.read)}/s, writes {format_bytes(speed.write)}/s (measured for 2 s)"


# ---- training ----


def print_training(
    args: Any,
    origin: str | Path,
    adapters: Callable[[BoundMap], Mapping[str, int] | None],
    trained: Callable[[BoundMap], Collection[str] | None],
) -> None:
    """Bytes, files, memory, time, layouts and command of a training command; `args` have the model's fields set.

    adapters: Hugging Face module -> rank, of a run that trains only these. trained: Hugging Face names, of one that
    freezes the others.
    """
    root = Path(origin)
    weights = bool(args.mcore_model) or any(root.glob("*.safetensors"))
    source = Checkpoint.open(root, weights=weights)  # holds config.json against the tensors that are there
    files = [file for file in source.source.files if weights and file.suffix != ".metadata"]
    bound = bind_map(grown(source.config, args.new_tokens), source.names)
    pairs = isinstance(args, PreferenceArguments)
    own_reference = pairs and not args.precompute_ref_log_probs and (args.ref_model or args.train_type != "lora")
    model = TrainingModel(
        bound, args, args.dtype or torch.float32, sequences=2 if pairs and not args.packing else 1,
        reference=bool(own_reference), adapters=adapters(bound), trained=trained(bound),
    )  # fmt: skip
    stored = checkpoint_bytes(model, with_optimizer=False)
    planned = source.source.stored_bytes if isinstance(source.source, PlannedSource) else 0
    read = planned or sum(file.stat().st_size for file in files)
    saved = checkpoint_bytes(model, with_optimizer=not args.no_save_optim)
    speed = probe_disk(Path(args.output_dir))
    times = ""
    if speed is not None:
        times = f"; loading {format_seconds(read / speed.read)}, each save {format_seconds(saved / speed.write)}"
    hf = f", and {format_bytes(stored)} as Hugging Face files" if args.save_safetensors else ""
    _rows(
        [
            ("model", f"{model.num_parameters:,} parameters, {model.num_trained:,} trained"),
            ("reads", f"{format_bytes(read)}{f' in {len(files)} files' if files else ''}"),
            ("saves", f"{format_bytes(saved)} in each checkpoint{hf}"),
            ("disk", _disk(Path(args.output_dir), saved, speed) + times),
        ]
    )
    print_layouts(args, model, command((), args, _PARALLEL), own=True)


def checkpoint_bytes(model: TrainingModel, with_optimizer: bool) -> int:
    """Of all tensors, MTP blocks too; the optimizer keeps the main weights and two moments in fp32.

    Checkpoints of adapters hold these alone.
    """
    width = model.dtype.itemsize
    if model.adapters is not None:
        return model.num_trained * (16 if with_optimizer else 4)
    weights = sum(math.prod(e.shape) * (4 if e.rule.keep_dtype else width) for e in model.bound.entries)
    return weights + (12 * model.num_trained if with_optimizer else 0)


def own_layout(args: Any, gpus: int) -> Layout:
    """The layout that the flags ask for. Raises: UsageError if it does not fit the number of GPUs."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep = args.expert_model_parallel_size
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    layers = args.description.num_layers
    stages = even_stages(layers, pp)
    if first or last:
        between = pp - bool(first) - bool(last)
        rest = layers - (first or 0) - (last or 0)
        stages = (*([first] if first else []), *([rest // max(between, 1)] * between), *([last] if last else []))
    dp = args.data_parallel_size(gpus)
    etp = args.expert_tensor_parallel_size or tp
    chunks = args.num_virtual_stages_per_pipeline_rank or 1
    return Layout(tp, pp, ep, etp, dp, stages, args.recompute_granularity, bool(args.sequence_parallel), chunks)


def print_layouts(args: Any, model: TrainingModel, words: Sequence[str], own: bool = False) -> None:
    """A table of layouts that fit the GPUs and the command of the first one; own: of the one that the flags ask for.

    words: flags of `swiftlite megatron sft` that the command begins with.
    """
    gpus = args.gpus or num_processes()
    micro = model.args.micro_batch_size
    length = model.args.seq_length if own else args.max_length
    batch = model.args.global_batch_size or gpus * micro * (model.args.gradient_accumulation_steps or 1)
    print(f"\ntraining on {gpus} GPUs of {args.gpu_memory}: {micro * model.sequences} x {length} tokens at a time, "
          f"global batch {batch}; GB on the fullest GPU, with flash attention, 3 GB for CUDA and NCCL included")  # fmt: skip
    print(f"{'TP':>3}{'PP':>4}{'EP':>4}{'ETP':>4}{'DP':>4} {'recompute':<10}{'weights':>9}{'grads':>8}{'optim':>8}"
          f"{'activ':>8}{'total':>8}")  # fmt: skip
    if own and _print_own(args, model, gpus, micro, length):
        return
    found = model.fitting(gpus, args.gpu_memory_bytes, micro, length, batch)
    for layout, need in found[:8]:
        _print_layout(layout, need)
    if found:
        data = [] if "--dataset" in words else ["--dataset", "FILE"]
        name = args.COMMAND if own else "megatron sft"
        _print_command(gpus, ["swiftlite", *name.split(), *words, *data, *found[0][0].flags()])
        return
    layout, need = model.smallest(gpus, micro, length, max(batch // micro, 1))
    _print_layout(layout, need)
    print(f"no layout fits: the smallest takes {format_bytes(need.total)} a GPU; {_enough(args, model, gpus, length)}")


def _print_own(args: Any, model: TrainingModel, gpus: int, micro: int, length: int) -> bool:
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
    fits: bool = needs[layout.recompute].total <= args.gpu_memory_bytes
    if fits:
        _print_command(gpus, command(["swiftlite", *args.COMMAND.split()], args))
    else:
        print(f"your flags need {format_bytes(needs[layout.recompute].total)} a GPU; what fits:")
    return fits


def _enough(args: Any, model: TrainingModel, gpus: int, length: int) -> str:
    """The first doubling of the GPUs with which something fits."""
    for _ in range(8):
        gpus *= 2
        if model.fitting(gpus, args.gpu_memory_bytes, model.args.micro_batch_size, length, gpus):
            return f"{gpus} GPUs of {args.gpu_memory} are enough"
    return "use larger GPUs or a shorter --max_length"


def _print_layout(layout: Layout, need: MemoryUse, note: str = "") -> None:
    parts = (need.weights, need.gradients, need.optimizer, need.activations, need.total)
    sizes = "".join(f"{part / 1e9:>{width}.1f}" for part, width in zip(parts, (9, 8, 8, 8, 8), strict=True))
    print(f"{layout.tp:>3}{layout.pp:>4}{layout.ep:>4}{layout.etp:>4}{layout.dp:>4} "
          f"{layout.recompute or 'none':<10}{sizes} {note}".rstrip())  # fmt: skip


def _print_command(gpus: int, words: Sequence[str]) -> None:
    environment = f"NPROC_PER_NODE={min(gpus, GPUS_PER_NODE)}"
    if gpus > GPUS_PER_NODE:
        environment = f"NNODES={gpus // GPUS_PER_NODE} NODE_RANK=0.. MASTER_ADDR=HOST {environment}"
    print(f"command     {environment} {shlex.join(words)}")
