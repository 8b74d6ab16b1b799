"""`swiftlite infer`: chat in the terminal, answer one prompt, or answer a dataset, with transformers' generate."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from swiftlite.arguments.base import BaseArguments, DataArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import specs
from swiftlite.checkpoint.info import load_args
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.encoded import place_of
from swiftlite.llm.dataset.loader import Question, ReadOptions, read_questions
from swiftlite.llm.dataset.preprocess import Row, RowError
from swiftlite.llm.dataset.report import printable
from swiftlite.llm.dataset.rows import read_rows, register_named
from swiftlite.llm.generate import Generator, Message
from swiftlite.utils.errors import DatasetError, TemplateError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.utils.types import Json

logger = get_logger()

HELP = "Type a message. `clear` starts a new conversation, `system TEXT` sets the system message, `exit` ends."


def chat(generator: Generator, stream: bool = True) -> None:
    """Talk with the model until `exit` or the end of the input. Ctrl-C ends an answer, not the chat."""
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # input() then edits its line and remembers earlier ones
    logger.info(HELP)
    system: list[Message] = []
    history: list[Message] = []
    while True:
        try:
            query = input("<<< ").strip()
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if query in ("exit", "quit"):
            return
        if query == "clear":
            history = []
            continue
        if query.startswith("system "):
            system, history = [{"role": "system", "content": query.removeprefix("system ").strip()}], []
            continue
        if not query:
            continue
        history.append({"role": "user", "content": query})
        try:
            text = write_answer(generator, system + history, stream)
        except TemplateError as error:
            logger.error("%s", error)
            history.pop()
            continue
        history.append(generator.template.parse_response(text))


def write_answer(generator: Generator, messages: Sequence[Message], stream: bool) -> str:
    """Write the answer to standard output, in pieces with `stream`. Returns: the text."""
    text = ""
    pieces = generator.stream(messages) if stream and generator.num_beams == 1 else iter(generator.answer([messages]))
    try:
        for piece in pieces:
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if hasattr(pieces, "close"):
            pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return text


def split_row(standard: Json) -> tuple[list[Message], str | None]:
    """`(messages up to where the model answers, reference answer)` of a standard row."""
    messages, reference = list(standard["messages"]), None
    while messages and messages[-1]["role"] == "assistant":
        reference = messages.pop().get("content")
    return messages, reference


def answer_rows(generator: Generator, rows: Sequence[Question], batch_size: int) -> Iterator[Json]:
    """Each row with `response` (the model's) and `labels` (the reference, where it has one).

    Args: rows: what read_questions gives. A row that cannot be answered gets `response` None and `error`.
    """
    for start in range(0, len(rows), batch_size):
        batch, good = [], []
        conversations, tools = [], []
        for place, raw, standard in rows[start : start + batch_size]:
            row = dict(raw) if isinstance(raw, Mapping) else {"row": raw.row if isinstance(raw, RowError) else raw}
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


def validation_data(args: InferArguments) -> list[tuple[str, Row, Json]]:
    """What the run that wrote the adapter, or the model, was evaluated on; as read_questions gives rows.

    Raises: UsageError where no args.json says it, or that run had no evaluation.
    """
    directory = Path(args.adapters[0] if args.adapters else args.model_info.model_dir).expanduser()
    recorded = load_args(directory)
    names = (*specs(DataArguments), "use_hf")
    kept = {name: recorded[name] for name in names if recorded.get(name) is not None and not name.startswith("cached")}
    if not kept.get("val_dataset") and not (kept.get("dataset") and kept.get("split_dataset_ratio")):
        raise UsageError(f"--load_data_args true: {directory} names no validation data; name it with --val_dataset")
    rows = read_rows(BaseArguments(**{**kept, "streaming": False}))[1]
    return [(place_of(row, number), row, row) for number, row in enumerate(rows)]


def infer_dataset(generator: Generator, args: InferArguments) -> None:
    """Answer `--val_dataset`; the result file appears when it is complete.

    Raises: DatasetError where no row could be answered; the file says why of each.
    """
    register_named(args)
    options = ReadOptions(args.columns, args.use_hf, False, 1, args.hub_token)
    rows = validation_data(args) if args.load_data_args else read_questions(args.val_dataset, options, args.seed)
    answered = progress_bar(answer_rows(generator, rows, args.max_batch_size), total=len(rows), desc="rows")
    path = None if args.result_path is None else Path(args.result_path)
    errors = []
    if path is None:
        for row in answered:
            errors += [row["error"]] if row["response"] is None else []
            sys.stdout.write(as_line(row))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as out:
            for row in answered:
                errors += [row["error"]] if row["response"] is None else []
                out.write(as_line(row))
                out.flush()
            os.fsync(out.fileno())
        os.replace(partial, path)
    where = f"; results in {path}" if path is not None else ""
    if len(errors) == len(rows):
        raise DatasetError(f"none of {len(rows)} rows could be answered, the first: {errors[0][:300]}{where}")
    logger.info("%d rows answered, %d could not be%s", len(rows) - len(errors), len(errors), where)
    if errors:
        logger.warning("%d of %d rows could not be answered, the first: %s", len(errors), len(rows), errors[0][:300])


def infer_main(args: InferArguments | Sequence[str]) -> None:
    """Chat, or with `--prompt` answer once, or with `--val_dataset` answer a file (see InferArguments)."""
    args = as_arguments(InferArguments, args)
    generator = Generator.from_arguments(args)
    stream = args.stream is not False
    if args.val_dataset or args.load_data_args:
        infer_dataset(generator, args)
    elif args.prompt is not None:
        write_answer(generator, [{"role": "user", "content": args.prompt}], stream)
    else:
        chat(generator, stream)
