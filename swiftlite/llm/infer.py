"""`swiftlite infer`: chat in the terminal, answer one prompt, or answer a dataset, with transformers' generate."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from swiftlite.arguments.infer import InferArguments
from swiftlite.checkpoint.resolve import as_arguments, resolve
from swiftlite.llm.answers import answer_rows, answered_before, as_line, validation_data
from swiftlite.llm.dataset.loader import Question, ReadOptions, read_questions
from swiftlite.llm.dataset.rows import register_named
from swiftlite.llm.generate import Generator, Message
from swiftlite.llm.scores import Judged
from swiftlite.utils.errors import DatasetError, TemplateError, UsageError
from swiftlite.utils.io import write_text_atomic
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.utils.types import Json

logger = get_logger()

HELP = "Type a message. `clear` starts a new conversation, `system TEXT` sets the system message, `exit` ends."


def line_reader() -> Callable[[str], str]:
    """Reads a line that can be edited, with earlier ones at hand: by prompt_toolkit where it is installed, else readline."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            from prompt_toolkit import PromptSession

            return PromptSession[str]().prompt
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # input() then edits its line and remembers earlier ones
    return input


def chat(generator: Generator, stream: bool = True) -> None:
    """Talk with the model until `exit` or the end of the input. Ctrl-C ends an answer, not the chat."""
    ask = line_reader()
    logger.info(HELP)
    system: list[Message] = []
    history: list[Message] = []
    while True:
        try:
            query = ask("<<< ").strip()
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


_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def dimmed(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of an answer for a terminal: what stands between <think> and </think> is dim."""
    text, thinks = "", False
    for piece in pieces:
        text += piece
        while (at := text.find(tag := "</think>" if thinks else "<think>")) >= 0:
            end = at + len(tag)
            yield f"{text[:end]}{_PLAIN}" if thinks else f"{text[:at]}{_DIM}{tag}"
            text, thinks = text[end:], not thinks
        held = next(n for n in range(len(tag) - 1, -1, -1) if text.endswith(tag[:n]))  # it may be the tag's beginning
        yield text[: len(text) - held]
        text = text[len(text) - held :]
    yield text + _PLAIN * thinks


def write_answer(generator: Generator, messages: Sequence[Message], stream: bool) -> str:
    """Write the answer to standard output, in pieces with `stream`; thoughts are dim in a terminal. Returns: the text."""
    said: list[str] = []
    pieces = generator.stream(messages) if stream and generator.num_beams == 1 else iter(generator.answer([messages]))

    def heard() -> Iterator[str]:
        for piece in pieces:
            said.append(piece)
            yield piece

    try:
        for piece in dimmed(heard()) if sys.stdout.isatty() else heard():
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        if hasattr(pieces, "close"):
            pieces.close()
        sys.stdout.write(_PLAIN if sys.stdout.isatty() else "")
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(said)


def infer_dataset(answer: Callable[[Sequence[Question], int], Iterator[Json]], args: InferArguments) -> None:
    """Answer `--val_dataset`; the result file appears when it is complete.

    Args: answer: (rows, rows at once) -> each with its answer, see answer_rows.
    Raises: DatasetError where no row could be answered; the file says why of each.
    """
    register_named(args)
    options = ReadOptions(args.columns, args.use_hf, False, 1, args.hub_token, grouped=args.groups)
    rows = validation_data(args) if args.load_data_args else read_questions(args.val_dataset, options, args.seed)
    path = None if args.result_path is None else Path(args.result_path)
    unfinished = None if path is None else path.with_name(path.name + ".partial")
    before = [] if path is None or unfinished is None else answered_before(path, unfinished, rows)
    left = rows[len(before) :]
    judged = Judged(args.metric) if args.metric and args.task_type != "seq_cls" else None  # a classifier always says it
    answered = progress_bar(answer(left, args.max_batch_size), total=len(left), desc="rows")
    if judged is not None:
        for row in before:
            judged.add(row)
        answered = map(judged.add, answered)
    errors = [str(row["error"]) for row in before if row.get("response") is None]
    if before:
        logger.info(
            "%d of %d rows were answered before, by whatever model and settings; %d are left. To answer all: remove %s",
            len(before), len(rows), len(left), unfinished if unfinished and unfinished.is_file() else path,
        )  # fmt: skip
    if path is None:
        for row in answered:
            errors += [row["error"]] if row["response"] is None else []
            sys.stdout.write(as_line(row))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        assert unfinished is not None
        write_text_atomic(unfinished, "".join(map(as_line, before)))
        with open(unfinished, "a", encoding="utf-8") as out:
            for row in answered:
                errors += [row["error"]] if row["response"] is None else []
                out.write(as_line(row))
                out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, path)
    where = f"; results in {path}" if path is not None else ""
    if len(errors) == len(rows):
        raise DatasetError(f"none of {len(rows)} rows could be answered, the first: {errors[0][:300]}{where}")
    logger.info("%d rows answered, %d could not be%s", len(rows) - len(errors), len(errors), where)
    if judged is not None:
        logger.info("%s", judged)
    if errors:
        logger.warning("%d of %d rows could not be answered, the first: %s", len(errors), len(rows), errors[0][:300])


def classify(args: InferArguments) -> None:
    """What a model with a head says of `--prompt` or of the rows of `--val_dataset`."""
    from swiftlite.llm.classify import Classifier

    if args.prompt is None and not args.val_dataset and not args.load_data_args:
        raise UsageError("this model classifies and does not chat: give --prompt TEXT or --val_dataset FILE")
    classifier = Classifier.from_arguments(args)
    if args.prompt is not None:
        (logits,) = classifier.logits([{"messages": [{"role": "user", "content": args.prompt}]}])
        if isinstance(logits, TemplateError):
            raise logits
        sys.stdout.write(as_line(classifier.said(logits)))
        return
    infer_dataset(classifier.answer_rows, args)
    if classifier.summary():
        logger.info("%s", classifier.summary())


def rerank(args: InferArguments) -> None:
    """What a reranker says of the documents in the rows of `--val_dataset`."""
    from swiftlite.llm.rerank import DocumentJudge

    if not args.val_dataset and not args.load_data_args:
        raise UsageError(
            "this model scores documents and does not chat: give --val_dataset FILE, rows of a query and documents"
        )
    judge = DocumentJudge.from_arguments(args)
    infer_dataset(judge.answer_rows, args)
    if judge.summary():
        logger.info("%s", judge.summary())


def infer_main(args: InferArguments | Sequence[str]) -> None:
    """Chat, or with `--prompt` answer once, or with `--val_dataset` answer a file (see InferArguments).

    A model that classifies or scores says so of the prompt or of each row.
    """
    args = as_arguments(InferArguments, args)
    resolve(args)
    if args.task_type == "seq_cls":
        classify(args)
        return
    if args.groups:
        rerank(args)
        return
    if args.infer_backend == "vllm":
        from swiftlite.llm.generate_vllm import VllmGenerator

        infer_dataset(partial(answer_rows, VllmGenerator.from_arguments(args)), args)
        return
    if args.infer_backend in ("sglang", "lmdeploy"):
        logger.warning("transformers answers; for throughput: --infer_backend vllm, or `swiftlite deploy` and a client")
    generator = Generator.from_arguments(args)
    stream = args.stream is not False
    if args.val_dataset or args.load_data_args:
        infer_dataset(partial(answer_rows, generator), args)
    elif args.prompt is not None:
        write_answer(generator, [{"role": "user", "content": args.prompt}], stream)
    else:
        chat(generator, stream)
