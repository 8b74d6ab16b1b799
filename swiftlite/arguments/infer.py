"""Arguments of `swiftlite infer`, and what it shares with `deploy`: the engine that computes answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.base import BaseArguments, DataArguments, GenerationArguments
from swiftlite.arguments.flags import INFER_NOTES
from swiftlite.arguments.parser import Arguments, Note, arguments, field, specs
from swiftlite.utils.errors import UsageError

# Flags of data, which commands that train on none refuse.
ONLY_TRAINING = ("merge_lora", "padding_free", "loss_scale")
_CALLED = {"pt": "transformers", "hf": "transformers", "huggingface": "transformers"}


@arguments
class EngineArguments(Arguments):
    """Engine: what computes the answers"""

    infer_backend: str | None = field(
        None, "engine: transformers, vllm or sglang", choices=["transformers", *_CALLED, "vllm", "sglang", "lmdeploy"],
        common=True,
    )  # fmt: skip
    tensor_parallel_size: int = field(
        1, "vllm, sglang: GPUs that share each layer", aliases=["vllm_tensor_parallel_size", "sglang_tp_size"], least=1,
        common=True,
    )  # fmt: skip
    max_model_len: int | None = field(
        None, "longest conversation with its answer, in tokens (default: what the model holds)",
        aliases=["vllm_max_model_len", "sglang_context_length"], least=1, common=True,
    )  # fmt: skip
    gpu_memory_utilization: float | None = field(
        None, "vllm, sglang: share of a GPU's memory for weights and keys and values",
        aliases=["vllm_gpu_memory_utilization", "sglang_mem_fraction_static"], least=0, most=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.infer_backend = _CALLED.get(self.infer_backend or "", self.infer_backend)


@arguments
class InferArguments(EngineArguments, GenerationArguments, BaseArguments):
    """Inference: chat, one prompt, or a dataset"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **{
            name: Note("rejected", "has no effect on inference")
            for name in (*specs(DataArguments), *ONLY_TRAINING)
            if name not in ("val_dataset", "columns", "dataset_info")
        },
        **INFER_NOTES,
        "output_dir": Note("rejected", "inference writes only --result_path"),
    }

    prompt: str | None = field(None, "answer this and end", aliases=["query"], common=True)
    load_data_args: bool = field(False, "answer the validation data of the run that wrote the adapter or the model")
    result_path: str | None = field(
        None, "JSONL file for the answers to --val_dataset; the same command resumes one that was ended early",
        path=True, common=True,
    )  # fmt: skip
    max_batch_size: int = field(1, "rows of --val_dataset answered at once", least=1)
    metric: str | None = field(
        None, "also say how near the answers are to those of the data: acc (equal texts) or rouge; see `swiftlite eval`",
        choices=["acc", "rouge"],
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.val_dataset:
            raise UsageError("--prompt and --val_dataset: give one of them")
        if self.infer_backend == "vllm" and not (self.val_dataset or self.load_data_args):
            raise UsageError(
                "--infer_backend vllm: answers a dataset here (--val_dataset FILE); chat with what `swiftlite deploy` serves"
            )
        if self.infer_backend == "vllm" and self.num_beams > 1:
            raise UsageError(f"--num_beams {self.num_beams}: not with --infer_backend vllm; use transformers")
        if self.load_data_args and (self.prompt is not None or self.val_dataset):
            raise UsageError("--load_data_args true: names the data; leave out --prompt and --val_dataset")
        if self.metric is not None and not self.val_dataset and not self.load_data_args:
            raise UsageError(f"--metric {self.metric}: judges answers to --val_dataset FILE")
        if self.result_path is not None and not self.val_dataset and not self.load_data_args:
            raise UsageError(f"--result_path {self.result_path}: needs --val_dataset FILE")
