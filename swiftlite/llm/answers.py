"""Answers to the rows of a data set, as lines of a result file; an earlier run's are taken up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from swiftlite.arguments.base import BaseArguments, DataArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import specs
from swiftlite.checkpoint.info import load_args
from swiftlite.llm.dataset.encoded import place_of
from swiftlite.llm.dataset.loader import Question
from swiftlite.llm.dataset.preprocess import RowError
from swiftlite.llm.dataset.report import printable
from swiftlite.llm.dataset.rows import read_rows
from swiftlite.llm.generate import Answers, Message
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.types import Json


def split_row(standard: Json) -> tuple[list[Message], str | None]:
    """`(messages up to where the model answers, reference answer)` of a standard row."""
    messages, reference = list(standard["messages"]), None
    while messages and messages[-1]["role"] == "assistant":
        reference = messages.pop().get("content")
    return messages, reference


def answer_rows(generator: Answers, rows: Sequence[Question], batch_size: int) -> Iterator[Json]:
    """Each row with `response` (the model's) and `labels` (the reference, where it has one).

    Args: rows: what read_questions gives. A row that cannot be answered gets `response` None and `error`.
    """
    for start in range(0, len(rows), batch_size):
        batch, good = [], []
        conversations, tools = [], []
        for place, raw, standard in rows[start : start + batch_size]:
            row = as_row(raw)
            batch.append(row)
            try:
                if isinstance(standard, RowError):
                    raise standard
                messages, reference = split_row(standard)
                generator.check_room(messages, standard.get("tools"))
            except (RowError, TemplateError) as error:
                row |= {"response": None, "error": f"{place}: {printable(str(error))}"}
                continue
            if reference is not None:
                row["labels"] = reference
            good.append(row)
            conversations.append(messages)
            tools.append(standard.get("tools"))
        for row, text in zip(good, generator.answer(conversations, tools) if good else (), strict=True):
            row["response"] = text
        yield from batch


def as_line(row: Json) -> str:
    """A result as JSON that every reader takes: what is neither JSON nor a character in the row is written as text."""
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError):
        kept = {key: value for key, value in row.items() if key in ("response", "labels", "error")}
        rest = {str(key): ascii(value) for key, value in row.items() if key not in kept}
        text = json.dumps({**rest, **kept}, default=str)
    return text + "\n"


_ADDED = ("response", "labels", "error", "name", "logits", "rejected")  # the last three by models that classify


def answered_before(path: Path, partial: Path, rows: Sequence[Question]) -> list[Json]:
    """The results that an earlier run of the same command has left: what it wrote before it was ended, or all.

    Raises: UsageError if they belong to other rows.
    """
    source = partial if partial.is_file() else path
    if not source.is_file():
        return []
    found: list[Json] = []
    for line in source.read_text(encoding="utf-8").splitlines(keepends=True):
        with suppress(ValueError):  # the line that was being written
            found += [json.loads(line)] if line.endswith("\n") else []
    for number, (row, question) in enumerate(zip(found, rows, strict=False)):
        if "response" not in row or _bare(row) != _bare(json.loads(as_line(as_row(question[1])))):
            raise UsageError(
                f"--result_path {path}: {source.name} holds results of other rows (line {number + 1}); name another file, "
                "or remove it"
            )
    if len(found) > len(rows):
        raise UsageError(
            f"--result_path {path}: {source.name} holds {len(found)} rows, the data {len(rows)}; name another file"
        )
    return found


def _bare(row: Json) -> Json:
    return {key: value for key, value in row.items() if key not in _ADDED}


def as_row(raw: object) -> Json:
    """A raw row as it begins a result."""
    return dict(raw) if isinstance(raw, Mapping) else {"row": raw.row if isinstance(raw, RowError) else raw}


_TASK = ("task_type", "num_labels", "problem_type")


def validation_data(args: InferArguments) -> list[tuple[str, Json, Json]]:
    """What the run that wrote the adapter, or the model, was evaluated on; as read_questions gives rows.

    Raises: UsageError where no args.json says it, or that run had no evaluation.
    """
    directory = Path(args.adapters[0] if args.adapters else args.model_info.model_dir).expanduser()
    recorded = load_args(directory)
    names = (*specs(DataArguments), *(_TASK if recorded.get("rlhf_type") is None else ()), "use_hf")
    kept = {name: recorded[name] for name in names if recorded.get(name) is not None and not name.startswith("cached")}
    if not kept.get("val_dataset") and not (kept.get("dataset") and kept.get("split_dataset_ratio")):
        raise UsageError(f"--load_data_args true: {directory} names no validation data; name it with --val_dataset")
    rows = read_rows(BaseArguments(**{**kept, "streaming": False}))[1]
    return [(place_of(row, number), row, row) for number, row in enumerate(rows)]
