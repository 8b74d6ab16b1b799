"""Arguments of training on preference pairs (`swiftlite dpo`, `swiftlite rlhf --rlhf_type dpo`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.flags import DPO_NOTES, OTHER_PREFERENCES
from swiftlite.arguments.parser import Arguments, Note, arguments, field, run_setting
from swiftlite.arguments.train import SftArguments
from swiftlite.utils.errors import UsageError

LOSS_TYPES = ("sigmoid", "ipo", "hinge")


@arguments
class PreferenceArguments(Arguments):
    """Preference: the loss on pairs, and the reference that the policy is held to"""

    rlhf_type: str = field("dpo", "kind of preference training", unavailable=OTHER_PREFERENCES)
    beta: float = field(0.1, "strength of the pull to the reference", aliases=["pref_beta"], common=True)
    loss_type: str = field("sigmoid", "loss of a pair's margin", aliases=["pref_loss"], choices=LOSS_TYPES, common=True)
    label_smoothing: float = field(0.0, "probability that a preference is wrong, 0 to 0.5", least=0, most=0.5)
    rpo_alpha: float | None = field(
        None, "weight of the chosen answers' cross entropy that is added", aliases=["pref_ftx"], least=0
    )
    ref_model: str | None = field(
        None, "directory or id of the reference (default: the start weights; with LoRA the model without adapters)",
        path=True, common=True,
    )  # fmt: skip
    precompute_ref_log_probs: bool = run_setting(
        False, "the reference answers the whole dataset once before training, then its memory is free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0:
            raise UsageError(f"--beta {self.beta}: must be above 0")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise UsageError(f"--label_smoothing {self.label_smoothing}: goes with --loss_type sigmoid only")


@arguments
class DpoArguments(PreferenceArguments, SftArguments):
    """Direct preference optimisation

    Rows have `messages` and `rejected_messages` (or `rejected_response`, `chosen` and `rejected`, ...).
    """

    NOTES: ClassVar[Mapping[str, Note]] = DPO_NOTES

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {**super().directory_kinds, "ref_model": ("is_hf",)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if "loss_scale" not in self.given:
            self.loss_scale = "last_round"  # the turns before the last answer are the same in both
        if self.loss_scale not in ("default", "last_round", "all"):
            raise UsageError(f"--loss_scale {self.loss_scale}: preference training takes default, last_round or all")
        if self.truncation_strategy == "split":
            raise UsageError("--truncation_strategy split: a pair cannot be divided; use delete, left or right")
        if self.streaming:
            raise UsageError("--streaming true: not available for preference pairs; leave it out")
        if self.packing and self.group_by_length:
            raise UsageError("--packing true: packed sequences have one length; leave out --group_by_length")
