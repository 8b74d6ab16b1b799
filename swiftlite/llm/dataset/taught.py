"""The data of distillation on either side: rows as of sft, and a teacher whose tokens are theirs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from swiftlite.arguments.preference import PreferenceArguments
from swiftlite.llm.dataset.cache import difference, fingerprint
from swiftlite.llm.dataset.prepare import Dataset, load_data
from swiftlite.llm.dataset.teacher import TeacherLogits, samples_of_row, vocabulary_hash
from swiftlite.llm.model.loader import load_tokenizer
from swiftlite.train.order import Data, is_stream
from swiftlite.train.reference import check_teacher, model_directory
from swiftlite.utils.dist import all_gather, get_rank, get_world_size
from swiftlite.utils.errors import DatasetError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template


def load_taught(args: PreferenceArguments, template: Template) -> Data:
    """As load_data; with --teacher_logits both parts have these as `teacher`. Collective.

    Raises: UsageError for a teacher of another vocabulary or temperature; DatasetError for rows that it was not asked about,
    but those of a stream, which are found missing as they come.
    """
    vocabulary = template.tokenizer.get_vocab()
    if args.teacher_logits is None:
        named = str(args.teacher_model)
        tokenizer = load_tokenizer(str(model_directory(args, named)), trust_remote_code=args.trust_remote_code)
        check_teacher(named, vocabulary, tokenizer.get_vocab())
        return load_data(args, template)
    teacher = TeacherLogits(Path(args.teacher_logits).expanduser())
    if teacher.facts["temperature"] != args.temperature:
        raise UsageError(
            f"--temperature {args.temperature}: --teacher_logits {args.teacher_logits} was written with --temperature "
            f"{teacher.facts['temperature']}; use the same or write it again"
        )
    if teacher.facts["vocabulary"] != vocabulary_hash(vocabulary):
        raise UsageError(
            f"--teacher_logits {args.teacher_logits}: its teacher, {teacher.facts['teacher']}, has another vocabulary than "
            "--model; what it says of the next token can be learnt only by a model that has the same tokens"
        )
    parts = load_data(args, template)
    for part in parts:
        if part is not None:
            if not is_stream(part):
                _check_rows(teacher, (part[i] for i in range(len(part))), template)
            cast(Dataset, part).teacher = teacher
    get_logger().info(
        "%s: the %d likeliest tokens of each position, of %s", teacher.directory, teacher.ids.shape[1],
        teacher.facts["teacher"],
    )  # fmt: skip
    return parts


def _check_rows(teacher: TeacherLogits, rows: Iterable[Json], template: Template) -> None:
    """Raises: DatasetError if the teacher was not asked about some of these. Collective; ranks share the work."""
    found: list[bool] = []
    for number, row in enumerate(rows):
        if number % get_world_size() == get_rank():
            found += [teacher.find(sample) is not None for sample in samples_of_row(row)]
    missing, total = (sum(counts) for counts in zip(*all_gather((found.count(False), len(found))), strict=True))
    if missing:
        why = difference(teacher.facts["encoding"], fingerprint(template)) or "was written with other data"
        raise DatasetError(
            f"--teacher_logits {teacher.directory}: has no answer to {missing} of {total} samples; it {why}. Write it again "
            "with the --dataset, model and template of this run"
        )
