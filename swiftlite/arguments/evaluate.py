"""Arguments of `swiftlite eval`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.base import BaseArguments, DataArguments, GenerationArguments
from swiftlite.arguments.flags import EVAL_NOTES
from swiftlite.arguments.infer import EngineArguments
from swiftlite.arguments.parser import Note, arguments, field, specs
from swiftlite.arguments.task import PAIR_LOSS_TYPES
from swiftlite.utils.errors import UsageError

METRICS = ("loss", "exact_match", "choice", "rouge")


@arguments
class EvalArguments(EngineArguments, GenerationArguments, BaseArguments):
    """Evaluation: one model, or several side by side"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **{
            name: Note("rejected", "has no effect on evaluation")
            for name in specs(DataArguments)
            if name not in ("val_dataset", "columns", "dataset_info", "max_drop_ratio", "dataset_num_proc")
        },
        **EVAL_NOTES,
        "adapters": Note("rejected", "an adapter is a model of its own here: --model BASE ADAPTER_DIR"),
        "output_dir": Note("rejected", "evaluation writes only --result_path"),
    }
    REST: ClassVar[str | None] = "engine_args"

    model: list[str] = field(  # type: ignore[assignment]  # of several models, each gets arguments of its own
        [], "directories or hub ids; a run stands for its newest checkpoint, an adapter for its base with it",
        aliases=["model_name_or_path", "model_id_or_path"], path=True, common=True,
    )  # fmt: skip
    metrics: list[str] = field(
        ["loss"], "loss (with perplexity): of the data as training counts it; exact_match, choice, rouge: of answers to it",
        choices=METRICS, common=True,
    )  # fmt: skip
    objective: str = field(
        "sft",
        "what the loss is of: answers, plain text, or preference pairs",
        choices=["sft", "pt", "dpo"],
        common=True,
    )
    loss_type: str = field("sigmoid", "with --objective dpo: loss of a pair's scores", choices=PAIR_LOSS_TYPES)
    beta: float | None = field(None, "with --objective dpo: strength of the pull to the reference")
    ref_model: str | None = field(None, "with --objective dpo: reference (default: an adapter's base)", path=True)
    checkpoint: str = field("newest", "which checkpoint of a run", choices=["newest", "best"])
    result_path: str | None = field(None, "JSON file of the results", path=True, common=True)
    max_batch_size: int = field(
        1, "rows computed at once", aliases=["micro_batch_size", "per_device_eval_batch_size", "eval_batch_size"], least=1,
        common=True,
    )  # fmt: skip
    eval_backend: str = field(
        "native", "native: --metrics of --val_dataset; lm_eval: benchmarks of lm-evaluation-harness",
        choices=["native", "lm_eval"], common=True,
        elsewhere=dict.fromkeys(
            ("Native", "OpenCompass", "VLMEvalKit"),
            "benchmarks are run by lm-evaluation-harness here: --eval_backend lm_eval --tasks NAME; evalscope asks a model "
            "that `swiftlite deploy` serves",
        ),
    )  # fmt: skip
    tasks: list[str] = field([], "with lm_eval: names of benchmarks", aliases=["eval_dataset"], common=True)
    num_fewshot: int | None = field(None, "with lm_eval: examples before each question", least=0)
    limit: float | None = field(None, "with lm_eval: questions of each benchmark", aliases=["eval_limit"], least=0)
    engine_args: list[str] = field([], "with lm_eval: its own flags; better written last, behind --")

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        """Of each kind: see swiftlite.cli.prepared."""
        return {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UsageError("eval: give one or more models with --model DIR_OR_ID [DIR_OR_ID ...]")
        if self.eval_backend == "lm_eval":
            if not self.tasks:
                raise UsageError("--eval_backend lm_eval: name benchmarks with --tasks gsm8k mmlu")
            if self.val_dataset:
                raise UsageError("--val_dataset: goes with --eval_backend native; lm_eval brings its own data")
        elif not self.val_dataset:
            raise UsageError("eval: give the data with --val_dataset FILE, or --eval_backend lm_eval --tasks NAME")
        elif self.tasks:
            raise UsageError(f"--tasks {' '.join(self.tasks)}: goes with --eval_backend lm_eval")
        answers = [name for name in self.metrics if name != "loss"]
        if self.objective != "sft" and answers:
            raise UsageError(f"--metrics {answers[0]}: judges answers, --objective sft")
        if self.infer_backend not in (None, "transformers") and self.eval_backend == "native":
            raise UsageError(f"--infer_backend {self.infer_backend}: goes with --eval_backend lm_eval")
