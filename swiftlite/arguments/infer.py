"""Arguments of `swiftlite infer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.base import BaseArguments, DataArguments, GenerationArguments
from swiftlite.arguments.flags import INFER_NOTES
from swiftlite.arguments.parser import Note, arguments, field, specs
from swiftlite.utils.errors import UsageError


@arguments
class InferArguments(GenerationArguments, BaseArguments):
    """Inference: chat, one prompt, or a dataset"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **{
            name: Note("rejected", "has no effect on inference")
            for name in (*specs(DataArguments), "merge_lora", "padding_free", "loss_scale")
            if name not in ("val_dataset", "columns", "dataset_info")
        },
        **INFER_NOTES,
        "output_dir": Note("rejected", "inference writes only --result_path"),
    }

    prompt: str | None = field(None, "answer this and end", aliases=["query"], common=True)
    load_data_args: bool = field(False, "answer the validation data of the run that wrote the adapter or the model")
    result_path: str | None = field(None, "JSONL file for the answers to --val_dataset", path=True, common=True)
    max_batch_size: int = field(1, "rows of --val_dataset answered at once", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.val_dataset:
            raise UsageError("--prompt and --val_dataset: give one of them")
        if self.load_data_args and (self.prompt is not None or self.val_dataset):
            raise UsageError("--load_data_args true: names the data; leave out --prompt and --val_dataset")
        if self.result_path is not None and not self.val_dataset and not self.load_data_args:
            raise UsageError(f"--result_path {self.result_path}: needs --val_dataset FILE")
