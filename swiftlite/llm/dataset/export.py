"""`swiftlite export --to_cached_dataset true`: a dataset as token ids on disk, which every trainer maps into memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from swiftlite.arguments.base import ModelArguments, TemplateArguments
from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.parser import as_words, specs
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.dataset.answers import make_answers
from swiftlite.llm.dataset.cache import Part, write_cached_dataset
from swiftlite.llm.dataset.prepare import encode_and_pack, encode_parts, make_pairs
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.pipeline import prepare_template
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.dist import is_main_process
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import replace_directory
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.utils.output import check_output, mark_output

# By --template_mode.
_MAKES: dict[str, Callable[..., Part]] = {
    "train": encode_and_pack,
    "rlhf": make_pairs,
    "kto": make_answers,
}


def export_data(args: ExportArguments) -> Path:
    """What `export` makes of --dataset."""
    if args.to_cached_dataset:
        return export_cached_dataset(args)
    from swiftlite.llm.export_teacher import export_teacher_logits  # imports transformers' models

    return export_teacher_logits(args)


def export_cached_dataset(args: ExportArguments) -> Path:
    """Read, tokenise and perhaps pack `--dataset` (and --val_dataset) with the model's template; no weights are needed.

    Returns: the directory. Raises: UsageError, DatasetError.
    """
    output = output_of_data(args, "cached")
    if not is_main_process():
        return output
    check = partial(check_output, output, "cached dataset", args.exist_ok, inputs_of_data(args))
    check()
    resolve(args, download_model=False)
    template = prepare_template(args)
    real = Path(os.path.realpath(output))
    scratch = real.with_name(f".{real.name}.tmp-{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        make = _MAKES[args.template_mode]
        parts = encode_parts(args, template, RejectsFile(scratch / REJECTS_FILE), make)
        write_cached_dataset(scratch, template, parts, args)
        args.save(scratch)
        check()
        mark_output(scratch, "cached dataset")
        replace_directory(scratch, real)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    tokens = sum(parts["train"].lengths)
    get_logger().info("wrote %s: %d training samples, %d tokens", output, len(parts["train"]), tokens)
    commands = {"rlhf": ("dpo",), "kto": ("rlhf", "--rlhf_type", "kto")}
    log_next(
        "swiftlite", *commands.get(args.template_mode, ("sft",)), "--cached_dataset", output, *training_words(args)
    )
    return output


def output_of_data(args: ExportArguments, suffix: str) -> Path:
    """Where what is made of --dataset is written. Raises: UsageError for arguments that nothing can be made of."""
    flag = "to_cached_dataset" if args.to_cached_dataset else "to_teacher_logits"
    if not args.dataset:
        raise UsageError(f"--{flag} true: give the data with --dataset")
    if args.groups:
        raise UsageError(f"--{flag} true: not of --task_type {args.task_type}; give --dataset to the training")
    if args.streaming:
        raise UsageError(f"--{flag} true: reads whole datasets; leave out --streaming")
    if args.model is None:
        raise UsageError(f"--{flag} true: give the model, whose tokenizer and template are used, with --model")
    name = Path(args.dataset[0].split("#")[0]).stem or "dataset"
    return Path(args.output_dir or f"{name}-{suffix}")


def inputs_of_data(args: ExportArguments) -> list[str]:
    """What is read."""
    return [str(args.model), *(path.split("#")[0] for path in (*args.dataset, *args.val_dataset))]


def training_words(args: ExportArguments) -> list[str]:
    """Model and template as they were given here; tokens fit no other. The longest sample has another default there."""
    same = {*specs(ModelArguments), *specs(TemplateArguments), "packing", "packing_length", "custom_register_path"}
    words = as_words(args, without=(set(specs(type(args))) - same) | {"hub_token"})
    return words if "max_length" in args.given else [*words, "--max_length", str(args.max_length)]
