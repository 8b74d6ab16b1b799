"""Arguments of `swiftlite preview`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.flags import NO_WEIGHTS
from swiftlite.arguments.groups import GROUP_FLAGS, GroupArguments
from swiftlite.arguments.parser import Note, arguments, field
from swiftlite.arguments.task import GROUPED, TASK_LOSSES
from swiftlite.utils.errors import UsageError


@arguments
class PreviewArguments(GroupArguments):
    """Preview: rows as the model will see them"""

    NOTES: ClassVar[Mapping[str, Note]] = {
        **dict.fromkeys(("device_map", "adapters", "merge_lora", "torch_dtype", "attention_backend"), NO_WEIGHTS),
        "padding_free": Note("rejected", "has no effect: preview shows single rows"),
        "group_by_length": Note("rejected", "has no effect: preview makes no batches"),
        "cached_dataset": Note("rejected", "preview reads rows, not tokens"),
        "load_from_cache_file": Note("rejected", "has no effect: preview reads rows"),
        **{
            name: Note("rejected", "has no effect: preview computes no losses")
            for name in GROUP_FLAGS
            if not name.startswith("max_")
        },
    }

    num_rows: int = field(3, "rows that are shown", common=True, least=0)
    show_ids: bool = field(False, "list each token with its id and weight", common=True)
    color: str = field("auto", "colours in the terminal", choices=["auto", "always", "never"])
    rlhf_type: str | None = field(
        None, "rows as this command reads them; kto: each answer has a label; dpo, rm: pairs of answers",
        choices=["kto", "dpo", "rm"], common=True,
    )  # fmt: skip
    loss_type: str | None = field(
        None, "groups as this loss of --task_type reads them",
        choices=[*TASK_LOSSES["embedding"], *TASK_LOSSES["reranker"]],
    )  # fmt: skip
    html: str | None = field(None, "also write the report as this HTML file", path=True, common=True)

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {"model": ("config",)}

    @property
    def trains(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = TASK_LOSSES[self.task_type] if self.task_type in GROUPED else ()
        if self.loss_type not in (None, *known):
            fits = ", ".join(known) or "none that preview asks for"
            raise UsageError(f"--loss_type {self.loss_type}: --task_type {self.task_type or 'causal_lm'} has {fits}")
        self.loss_type = self.loss_type or next(iter(known), None)
        self.settle_groups(self.loss_type)
        if self.rlhf_type is not None:
            if self.pools:
                raise UsageError(
                    f"--task_type {self.task_type} with --rlhf_type {self.rlhf_type}: leave out one of them"
                )
            if "loss_scale" not in self.given:
                self.loss_scale = "last_round"  # as the command has it
        if not self.dataset:
            raise UsageError("preview: give the data with --dataset")
        if self.model is None:
            raise UsageError("preview: give the model, whose tokenizer and template are used, with --model DIR_OR_ID")
