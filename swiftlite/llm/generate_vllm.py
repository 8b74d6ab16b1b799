"""Answers to a dataset by vLLM in this process: the prompts are the template's token ids, as with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from swiftlite.arguments.infer import InferArguments
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.generate import Message
from swiftlite.llm.pipeline import prepare_template
from swiftlite.llm.template.messages import Tools
from swiftlite.utils.directories import ADAPTER_CONFIG
from swiftlite.utils.errors import TemplateError, UsageError
from swiftlite.utils.io import read_json
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from swiftlite.llm.template.base import Template


class VllmGenerator:
    """As Generator, for whole batches. longest: tokens of a conversation with its answer."""

    def __init__(
        self, engine: LLM, template: Template, settings: Json, longest: int | None, lora: LoRARequest | None = None
    ) -> None:
        self.engine, self.template = engine, template
        self.settings, self.longest = settings, longest
        self.lora = lora

    @classmethod
    def from_arguments(cls, args: InferArguments) -> VllmGenerator:
        """Raises: UsageError where vLLM is not installed."""
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError:
            raise UsageError(
                "--infer_backend vllm: is not installed; pip install vllm, or let a server of another environment answer: "
                "`swiftlite deploy --infer_backend vllm --dry_run true` prints its command"
            ) from None
        resolve(args)
        template, lora = prepare_template(args), None
        loading: Json = {
            "model": str(args.model_info.model_dir), "seed": args.seed, "dtype": args.torch_dtype,
            "tensor_parallel_size": args.tensor_parallel_size, "trust_remote_code": args.trust_remote_code,
        }  # fmt: skip
        for name in ("max_model_len", "gpu_memory_utilization"):
            if getattr(args, name) is not None:
                loading[name] = getattr(args, name)
        for adapter in args.adapters:
            rank = int(read_json(Path(adapter) / ADAPTER_CONFIG)["r"])
            loading |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
            lora = LoRARequest("adapter", 1, adapter)
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        settings: Json = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        settings |= {"stop": list(args.stop_words), "stop_token_ids": template.stop_token_ids}
        longest = args.max_model_len or args.model_info.max_model_len
        settings["max_tokens"] = args.max_new_tokens
        return cls(LLM(**loading), template, settings, longest, lora)

    def check_room(self, messages: Sequence[Message], tools: Tools | None = None) -> None:
        """Raises: TemplateError for a conversation that cannot be written, or leaves no room for an answer."""
        length = len(self.template.encode_prompt(list(messages), tools))
        if self.longest is not None and length >= self.longest:
            raise TemplateError(f"the conversation has {length} tokens, the model holds {self.longest}; shorten it")

    def answer(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] = ()) -> list[str]:
        """The answers to several conversations, see Generator.answer."""
        offers = tools or [None] * len(conversations)
        prompts = [self.template.encode_prompt(list(m), t) for m, t in zip(conversations, offers, strict=True)]
        made = self.engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], self._sampling(), use_tqdm=False, lora_request=self.lora
        )
        return [self.template.answer_prefix + output.outputs[0].text for output in made]

    def _sampling(self) -> SamplingParams:
        """The model's own, with the user's settings over it."""
        from vllm import SamplingParams

        self.engine.get_default_sampling_params()  # reads them
        return SamplingParams.from_optional(**{**(self.engine.default_sampling_params or {}), **self.settings})
