"""Arguments of `swiftlite infer`."""

from __future__ import annotations

from swiftlite.llm.argument.base import BaseArguments, GenerationArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.parser import arguments, field


@arguments
class InferArguments(GenerationArguments, BaseArguments):
    """Inference: chat, one prompt, or a data set"""

    prompt: str | None = field(None, "answer this and end", aliases=["query"])
    result_path: str | None = field(None, "JSONL file for the answers to --val_dataset")
    max_batch_size: int = field(1, "rows of --val_dataset answered at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.val_dataset:
            raise UsageError("--prompt and --val_dataset: give one of them")
        if self.result_path is not None and not self.val_dataset:
            raise UsageError(f"--result_path {self.result_path}: needs --val_dataset FILE")
        if self.max_batch_size < 1:
            raise UsageError(f"--max_batch_size {self.max_batch_size}: must be at least 1")
