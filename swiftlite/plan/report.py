"""What `--dry_run true` prints: bytes, files, memory, time, the command to type. Writes nothing.

The table of layouts is in layouts.py.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.planned import PlannedSource
from swiftlite.convert.conversion import Plan
from swiftlite.convert.mcore import McorePlan
from swiftlite.plan.layouts import command, own_layout, print_layouts
from swiftlite.plan.memory import TrainingModel
from swiftlite.plan.model import Adapters as Adapters
from swiftlite.plan.model import Trained as Trained
from swiftlite.plan.model import source_of, training_model
from swiftlite.utils.io import DiskSpeed, existing_parent, format_bytes, peak_memory_bytes, probe_disk
from swiftlite.utils.text import format_seconds, printable
from swiftlite.weights.storage import TensorSpec
from swiftlite.weights.stream import planned_bytes

_PARALLEL = {
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "context_parallel_size", "sequence_parallel", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "num_virtual_stages_per_pipeline_rank", "recompute", "recompute_granularity",
    "recompute_method", "recompute_num_layers", "recompute_modules",
}  # fmt: skip


def _rows(rows: Iterable[tuple[str, str]]) -> None:
    for name, text in rows:
        print(f"{name:<12}{text}")


# ---- conversion ----


def print_plan(args: ExportArguments, output_dir: Path, plan: Plan) -> None:
    """All there is to say of a conversion; of one to Megatron each rule, and the layouts that it can be trained in."""
    if not isinstance(plan, McorePlan):
        print_conversion(args, output_dir, plan)
        return
    print_coverage(plan)
    print_conversion(args, output_dir, plan)
    model = TrainingModel(plan.source.bound, plan.arguments, plan.trained_in or plan.main_dtype)
    print_layouts(args, model, ["--mcore_model", str(output_dir)])


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
    for name in plan.source.names:
        if name in plan.source.carried:
            spec = plan.carried.specs[name]
            print(
                printable(
                    f"carried: {name} {list(spec.shape)} {str(spec.dtype).removeprefix('torch.')} (no text model's)"
                )
            )
    for name in plan.source.ignored:
        print(printable(f"ignored: {name} (not a weight)"))
    for name, of in plan.source.copies.items():
        print(printable(f"left out: {name} (copy of {of})"))


def print_conversion(args: ExportArguments, output_dir: Path, plan: Plan) -> None:
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


def _disk(directory: Path, total: int, speed: DiskSpeed | None) -> str:
    free = shutil.disk_usage(existing_parent(directory)).free
    text = f"{format_bytes(free)} free" + ("" if total <= free else f": {format_bytes(total - free)} too little")
    if speed is None:
        return f"{text}; it cannot be written, so its speed is not known"
    return f"{text}; reads {format_bytes(speed.read)}/s, writes {format_bytes(speed.write)}/s (measured for 2 s)"


# ---- training ----


def out_of_memory(
    args: MegatronSftArguments, origin: str | Path, adapters: Adapters, trained: Trained, gpus: int, length: int,
    available: int,
) -> str:  # fmt: skip
    """What a step of `length` tokens takes, beside what a GPU has, and which layout takes less."""
    layout = own_layout(args, gpus)
    micro, accumulated, batch = args.batch_sizes(layout.dp)
    model = training_model(args, source_of(args, origin), adapters, trained)
    need = model.need(layout, micro, length, accumulated)
    parts = {"weights": need.weights, "gradients": need.gradients, "optimizer": need.optimizer}
    said = ", ".join(
        f"{name} {format_bytes(size)}" for name, size in {**parts, "activations": need.activations}.items()
    )
    fits = model.fitting(layout.gpus, available, micro, length, batch)
    advice = "take more GPUs or a shorter --max_length"
    if fits:
        advice = f"these flags fit: {shlex.join(fits[0][0].flags())}"
    return (
        f"out of GPU memory: with these settings {micro} x {length:,} tokens take about {format_bytes(need.total)} a GPU, "
        f"which has {format_bytes(available)} ({said}); {advice}; docs/memory.md says what else saves memory"
    )


def print_training(args: MegatronSftArguments, origin: str | Path, adapters: Adapters, trained: Trained) -> None:
    """Bytes, files, memory, time, layouts and command of a training command; `args` have the model's fields set."""
    source = source_of(args, origin)
    planned = source.source.stored_bytes if isinstance(source.source, PlannedSource) else 0
    files = [file for file in source.source.files if not planned and file.suffix != ".metadata"]
    model = training_model(args, source, adapters, trained)
    stored = checkpoint_bytes(model, with_optimizer=False)
    read = planned or sum(file.stat().st_size for file in files)
    saved = checkpoint_bytes(model, with_optimizer=not args.no_save_optim)
    speed = probe_disk(Path(str(args.output_dir)))
    times = ""
    if speed is not None:
        times = f"; loading {format_seconds(read / speed.read)}, each save {format_seconds(saved / speed.write)}"
    hf = f", and {format_bytes(stored)} as Hugging Face files" if args.save_safetensors else ""
    _rows(
        [
            ("model", f"{model.num_parameters:,} parameters, {model.num_trained:,} trained"),
            *_other_rows(model),
            ("reads", f"{format_bytes(read)}{f' in {len(files)} files' if files else ''}"),
            ("saves", f"{format_bytes(saved)} in each checkpoint{hf}"),
            ("disk", _disk(Path(str(args.output_dir)), saved, speed) + times),
        ]
    )
    print_layouts(args, model, command((), args, _PARALLEL))


def _other_rows(model: TrainingModel) -> list[tuple[str, str]]:
    """What is in memory besides the trained model."""
    if model.other is None:
        return []
    size = format_bytes(checkpoint_bytes(model.other, with_optimizer=False))
    weights = f"{model.other.num_parameters:,} parameters beside the model, {size}"
    if model.loss_bytes is None:
        return [("reference", weights)]
    more = "its logits of a step are among the activations; --teacher_logits takes neither"
    return [("teacher", f"{weights}; {more}")]


def checkpoint_bytes(model: TrainingModel, with_optimizer: bool) -> int:
    """Of all tensors, MTP blocks too; the optimizer keeps the main weights and two moments in fp32.

    Checkpoints of adapters hold these alone.
    """
    width = model.dtype.itemsize
    if model.adapters is not None:
        return model.num_trained * (16 if with_optimizer else 4)
    weights = sum(math.prod(e.shape) * (4 if e.rule.keep_dtype else width) for e in model.bound.entries)
    return weights + (12 * model.num_trained if with_optimizer else 0)
