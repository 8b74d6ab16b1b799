"""`swiftlite infer`: chat in the terminal, answer one prompt, or answer a dataset, with transformers' generate."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from swiftlite.arguments.base import BaseArguments, DataArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import specs
from swiftlite.checkpoint.files import end_tokens
from swiftlite.checkpoint.info import ModelInfo, load_args
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.encoded import place_of
from swiftlite.llm.dataset.loader import Question, ReadOptions, read_questions
from swiftlite.llm.dataset.prepare import read_rows, register_named
from swiftlite.llm.dataset.preprocess import Row, RowError
from swiftlite.llm.dataset.report import printable
from swiftlite.llm.pipeline import prepare_model_template
from swiftlite.llm.template.messages import Tools
from swiftlite.utils.errors import DatasetError, TemplateError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.progress import progress_bar
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig

    from swiftlite.llm.template.base import Template

logger = get_logger()

Message = Json

HELP = "Type a message. `clear` starts a new conversation, `system TEXT` sets the system message, `exit` ends."


class Generates(Protocol):
    """A model of transformers that writes text."""

    @property
    def device(self) -> torch.device: ...

    @property
    def generation_config(self) -> GenerationConfig: ...

    def generate(self, **keywords: object) -> Tensor: ...


@dataclass
class Generator:
    """Answers conversations with a Hugging Face model; a template writes the prompts and says what ends an answer."""

    model: Generates
    template: Template
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    num_beams: int = 1
    stop_words: Sequence[str] = ()

    @classmethod
    def from_arguments(cls, args: InferArguments) -> Generator:
        """Load what `args` names, put it on the GPU if there is one, add adapters."""
        import torch

        torch.manual_seed(args.seed)
        model, template = prepare_model_template(args)
        if len(args.adapters) > 1:
            raise UsageError("--adapters: one at a time; merge the others with `swiftlite export --merge_lora true`")
        for adapter in args.adapters:
            from swiftlite.llm.model.tuner import attach_adapter

            model = attach_adapter(model, Path(adapter))
        if args.device_map is None and torch.cuda.is_available():
            model = model.to("cuda")
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams", "stop_words")
        return cls(model.eval(), template, **{name: getattr(args, name) for name in names})

    def _config(self, prompt_length: int) -> GenerationConfig:
        """The model's own generation config with the user's settings over it."""
        from transformers import GenerationConfig

        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        if self.temperature is not None:
            config.do_sample = self.temperature > 0
        for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None:
                setattr(config, name, value)
        if not config.do_sample:  # without sampling these have no meaning, and transformers warns of them
            config.temperature = config.top_p = config.top_k = None
        config.num_beams = self.num_beams
        config.max_length = None
        config.max_new_tokens = self.max_new_tokens or self._room(prompt_length)
        config.eos_token_id = sorted({*self.template.stop_token_ids, *end_tokens(config.eos_token_id)})
        config.pad_token_id = self.template.tokenizer.pad_token_id
        config.stop_strings = list(self.stop_words) or None
        return config

    def _room(self, prompt_length: int) -> int:
        info: ModelInfo | None = getattr(self.model, "model_info", None)
        longest = info.max_model_len if info else None
        room = (longest or prompt_length + 2048) - prompt_length
        if room < 1:
            raise TemplateError(
                f"the conversation has {prompt_length} tokens, the model holds {longest}; shorten it or type `clear`"
            )
        return room

    def check_room(self, messages: Sequence[Message], tools: Tools | None = None) -> None:
        """Raises: TemplateError for a conversation that cannot be written, or leaves no room for an answer."""
        self._room(len(self.template.encode_prompt(list(messages), tools)))

    def _inputs(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] = ()
    ) -> dict[str, Tensor]:
        """Prompts padded on the left: input_ids and attention_mask, int64 [B, S]."""
        import torch

        offers = tools or [None] * len(conversations)
        prompts = [self.template.encode_prompt(list(m), t) for m, t in zip(conversations, offers, strict=True)]
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), self.template.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        device = self.model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def _end(self, text: str, start: int = 0) -> int:
        """Where the first stop word begins, from `start` on; -1: nowhere. The last token may reach beyond it."""
        return min((at for word in self.stop_words if (at := text.find(word, start)) >= 0), default=-1)

    def _cut(self, text: str) -> str:
        end = self._end(text)
        return text if end < 0 else text[:end]

    def answer(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] = ()) -> list[str]:
        """The answers to several conversations, generated as one batch.

        Args: conversations: lists of messages, each ending where the model is to continue. tools: the functions on offer
            in each conversation, as JSON schemas, or None.
        """
        import torch

        inputs = self._inputs(conversations, tools)
        length = inputs["input_ids"].shape[1]
        tokenizer = self.template.tokenizer
        with torch.inference_mode():
            out = self.model.generate(**inputs, generation_config=self._config(length), tokenizer=tokenizer)
        texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return [self.template.answer_prefix + self._cut(text) for text in texts]

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer in pieces, as they are generated. Leaving the iterator early ends the generation."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        abandoned = threading.Event()
        failures: list[BaseException] = []

        class Abandoned(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), abandoned.is_set(), device=input_ids.device)

        inputs = self._inputs([messages])
        tokenizer = self.template.tokenizer
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        config = self._config(inputs["input_ids"].shape[1])

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self.model.generate(
                        **inputs,
                        generation_config=config,
                        streamer=streamer,
                        tokenizer=tokenizer,
                        stopping_criteria=StoppingCriteriaList([Abandoned()]),
                    )
            except BaseException as error:  # raised again below, in the caller's thread
                failures.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            if self.template.answer_prefix:
                yield self.template.answer_prefix
            held = max(map(len, self.stop_words), default=1) - 1  # what may be the beginning of a stop word
            text, shown = "", 0
            for piece in streamer:
                text += piece
                end = self._end(text, shown)
                safe = len(text) - held if end < 0 else end
                if safe > shown:
                    yield text[shown:safe]
                    shown = safe
                if end >= 0:
                    break
            else:
                if text[shown:]:
                    yield text[shown:]
        finally:
            abandoned.set()
            thread.join()
        if failures:
            raise failures[0]


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
