"""What preference training compares its model with, on both sides."""

from __future__ import annotations

from typing import Literal

from swiftlite.arguments.preference import DpoArguments
from swiftlite.train.dpo_loss import PairLoss
from swiftlite.utils.errors import UsageError

Reference = Literal["none", "named", "start", "adapters off"]


def reference_kind(args: DpoArguments) -> Reference:
    """`--ref_model`, the model as training began, that with its adapters off, or none for this loss.

    Raises: UsageError if the policy begins with adapters and no --ref_model is given.
    """
    if not args.has_reference:
        return "none"
    if args.ref_model:
        return "named"
    if args.adapters or getattr(args, "mcore_adapter", None):
        raise UsageError(
            "--adapters: the reference would be the model without them; merge them first, or give --ref_model"
        )
    return "adapters off" if args.adapts else "start"


def pair_loss(args: DpoArguments) -> PairLoss:
    assert args.beta is not None  # after __post_init__
    return PairLoss(args.loss_type, args.beta, args.label_smoothing, args.rpo_alpha, args.simpo_gamma)


def check_reference(args: DpoArguments, rows: int | None, policy_rows: int | None) -> None:
    """Args: rows, policy_rows: of the vocabularies. Raises: UsageError if they differ."""
    if rows != policy_rows:
        raise UsageError(
            f"--ref_model {args.ref_model}: has {rows} rows in its vocabulary, the model has {policy_rows}; the reference "
            "must read the same tokens"
        )
