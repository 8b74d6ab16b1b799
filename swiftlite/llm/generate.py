"""Answers of a model to conversations, with transformers' generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from swiftlite.arguments.infer import InferArguments
from swiftlite.checkpoint.files import end_tokens
from swiftlite.checkpoint.info import ModelInfo
from swiftlite.llm.pipeline import prepare_model_template
from swiftlite.llm.stop_words import StopWords
from swiftlite.llm.template.messages import Tools
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.logger import warn_once
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel

    from swiftlite.llm.template.base import Template

Message = Json


class Generates(Protocol):
    """A model of transformers that writes text."""

    @property
    def device(self) -> torch.device: ...

    @property
    def generation_config(self) -> GenerationConfig: ...

    def generate(self, **keywords: object) -> Tensor: ...


class Answers(Protocol):
    """What answers the conversations of a dataset."""

    def check_room(self, messages: Sequence[Message], tools: Tools | None = None) -> None: ...

    def answer(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] = ()) -> list[str]: ...


def load_for_inference(args: InferArguments) -> tuple[PreTrainedModel, Template]:
    """(model, template) of what `args` names, on the GPU if there is one, with adapters."""
    import torch

    torch.manual_seed(args.seed)
    model, template = prepare_model_template(args)
    if len(args.adapters) > 1:
        raise UsageError("--adapters: one at a time; merge the others with `swiftlite export --merge_lora true`")
    for adapter in args.adapters:
        from swiftlite.llm.model.tuner import attach_adapter

        model = attach_adapter(model, Path(adapter))
    if args.device_map is None and torch.cuda.is_available():
        model = model.to("cuda")  # type: ignore[arg-type]  # transformers' wrapper hides the method's own type
    return model.eval(), template


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
    max_model_len: int | None = None

    @classmethod
    def from_arguments(cls, args: InferArguments) -> Generator:
        model, template = load_for_inference(args)
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams", "stop_words",
                 "max_model_len")  # fmt: skip
        return cls(cast("Generates", model), template, **{name: getattr(args, name) for name in names})

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
            if given := [f"--{name}" for name in ("top_p", "top_k") if getattr(self, name) is not None]:
                warn_once(f"{', '.join(given)}: no effect, the most likely token is taken; sample with --temperature 1")
            config.temperature = config.top_p = config.top_k = None
        config.num_beams = self.num_beams
        config.max_length = None
        room = self._room(prompt_length)
        config.max_new_tokens = min(self.max_new_tokens or room, room)
        config.eos_token_id = sorted({*self.template.stop_token_ids, *end_tokens(config.eos_token_id)})
        config.pad_token_id = self.template.tokenizer.pad_token_id
        config.stop_strings = list(self.stop_words) or None
        return config

    def _room(self, prompt_length: int) -> int:
        info: ModelInfo | None = getattr(self.model, "model_info", None)
        longest = self.max_model_len or (info.max_model_len if info else None)
        room = (longest or prompt_length + max(self.max_new_tokens or 0, 2048)) - prompt_length
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
        return [self.template.answer_prefix + StopWords(self.stop_words).cut(text) for text in texts]

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
            words = StopWords(self.stop_words)
            for piece in streamer:
                yield from filter(None, [words.feed(piece)])
                if words.ended:
                    break
            yield from filter(None, [words.rest()])
        finally:
            abandoned.set()
            thread.join()
        if failures:
            raise failures[0]
