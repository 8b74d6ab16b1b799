"""Adapters that are not plain LoRA are merged by peft, with the whole model in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.checkpoint.chat import copy_chat
from swiftlite.llm.model.tuner import attach_adapter
from swiftlite.llm.pipeline import load_model
from swiftlite.llm.train.saving import write_weights
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import replace_directory
from swiftlite.utils.logger import get_logger
from swiftlite.utils.output import check_output, mark_output

_KIND = "hf checkpoint"


def merge_in_memory(args: ExportArguments, adapter: Path, output_dir: Path) -> None:
    """Write the base model of resolved `args` with the adapter's changes. Raises: UsageError, CheckpointError."""
    if args.to_mcore or args.dry_run:
        flag = "--to_mcore" if args.to_mcore else "--dry_run"
        raise UsageError(f"{flag} true: {adapter} is no plain LoRA; merge it first, with --merge_lora true alone")
    check_output(output_dir, _KIND, args.exist_ok, [args.model_info.model_dir, adapter])
    get_logger().info(
        "%s is no plain LoRA of a model that writes text: peft merges it, with the whole model in memory", adapter
    )
    merged = attach_adapter(load_model(args), adapter).merge_and_unload()
    real = Path(os.path.realpath(output_dir))
    scratch = real.with_name(f".{real.name}.tmp-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        write_weights(merged, scratch, args)
        copy_chat(adapter, scratch)
        args.save(scratch)
        mark_output(scratch, _KIND)
        replace_directory(scratch, real)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
