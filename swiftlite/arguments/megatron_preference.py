"""Arguments of `swiftlite megatron dpo` (`swiftlite megatron rlhf --rlhf_type dpo`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import Note, arguments
from swiftlite.arguments.preference import DpoArguments
from swiftlite.utils.errors import UsageError


@arguments
class MegatronDpoArguments(MegatronSftArguments, DpoArguments):
    """Direct preference optimisation on megatron-core

    Rows have `messages` and `rejected_messages` (or `rejected_response`, `chosen` and `rejected`, ...).
    """

    COMMAND: ClassVar[str] = "megatron dpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.skip_train and self.has_reference and self.train_type != "lora"
        if alone and not (self.ref_model or self.ref_adapters):  # against itself every loss is that of no preference
            raise UsageError(
                "--skip_train true: compares with a reference; give --ref_model, what the model began with"
            )

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        kinds = ("is_hf", "is_megatron", *(["config"] if self.dry_run else []))
        models = dict.fromkeys(("ref_model", "teacher_model"), kinds)
        others = {"ref_adapters": ("is_peft", "is_megatron_adapter"), "teacher_logits": ("is_teacher_logits",)}
        return {**super().directory_kinds, **models, **others}

    NOTES: ClassVar[Mapping[str, Note]] = {
        "mcore_ref_model": Note("rejected", "give it with --ref_model, which takes checkpoints of either format"),
    }
