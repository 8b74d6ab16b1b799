"""`swiftlite export --to_teacher_logits true`: a teacher reads a dataset's answers once, before students are trained.

What is kept of it, and how it is found again: llm/dataset/teacher.py. One process.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.parser import as_words, specs
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.dataset.export import inputs_of_data, output_of_data, training_words
from swiftlite.llm.dataset.prepare import encode, encode_parts
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.teacher import TeacherWriter, key_of
from swiftlite.llm.pipeline import prepare_template
from swiftlite.llm.teacher import Teacher, batches_of
from swiftlite.utils.directories import REJECTS_FILE
from swiftlite.utils.dist import is_main_process
from swiftlite.utils.io import format_bytes, replace_directory, restore_directory
from swiftlite.utils.lock import output_lock
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.utils.output import check_output, mark_output, partial_of
from swiftlite.utils.progress import progress_bar

_KIND = "teacher logits"


def export_teacher_logits(args: ExportArguments) -> Path:
    """Ask the teacher about every answer of --dataset and --val_dataset; keep the likeliest tokens of each position.

    Returns: the directory. Raises: UsageError, DatasetError, CheckpointError.
    """
    output = output_of_data(args, "teacher")
    if not is_main_process():
        return output
    inputs = [str(args.teacher_model or args.model), *inputs_of_data(args)]
    check = partial(check_output, output, _KIND, args.exist_ok, inputs)
    check()
    resolve(args, download_model=args.teacher_model is None)
    unfinished, real = partial_of(output), Path(os.path.realpath(output))
    real.parent.mkdir(parents=True, exist_ok=True)
    with output_lock(output):
        restore_directory(real)
        check()
        _ask(args, unfinished)
        args.save(unfinished)
        mark_output(unfinished, _KIND)
        replace_directory(unfinished, real)
    data = as_words(args, without=set(specs(type(args))) - {"dataset", "val_dataset", "temperature"})
    log_next("swiftlite", "rlhf", "--rlhf_type", "gkd", "--teacher_logits", output, *training_words(args), *data)
    return output


def _ask(args: ExportArguments, directory: Path) -> None:
    """Fill the directory, from where it ends."""
    template = prepare_template(args)
    template.padding_free = False
    parts = encode_parts(args, template, RejectsFile(directory / REJECTS_FILE), encode)
    # By what is asked, so that nothing is asked twice.
    samples = {key_of(part[i]): (part, i) for part in parts.values() for i in range(len(part))}
    teacher = Teacher(args, template)
    writer = TeacherWriter(directory, teacher.facts)
    left = [place for key, place in samples.items() if key not in writer.keys]
    if len(left) < len(samples):
        get_logger().info("%d of %d samples were answered before", len(samples) - len(left), len(samples))
    bar = progress_bar(total=sum(part.lengths[i] for part, i in left), desc="teacher", unit=" tokens")
    try:
        for batch in batches_of(left):
            for sample, top in teacher.answers(batch):
                writer.add(sample, top)
                bar.update(len(sample["input_ids"]))
    finally:
        bar.close()
        writer.close()
    writer.finish()
    size = sum(path.stat().st_size for path in directory.iterdir())
    get_logger().info("%d samples, %d positions with a label, %s", len(samples), writer.end, format_bytes(size))
