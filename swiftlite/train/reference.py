"""What preference training compares its model with, on both sides."""

from __future__ import annotations

from typing import Literal

from swiftlite.arguments.preference import DpoArguments
from swiftlite.train.dpo_loss import PairLoss
from swiftlite.train.kto_loss import KtoLoss
from swiftlite.utils.errors import UsageError

Reference = Literal["none", "named", "start", "adapters off"]


def reference_kind(args: DpoArguments) -> Reference:
    """`--ref_model`, the model as training began, that with its adapters off, or none for this loss.

    The first two may have --ref_adapters. Raises: UsageError if the policy begins with adapters and neither is given.
    """
    if not args.has_reference:
        return "none"
    if args.ref_model:
        return "named"
    if args.ref_adapters:
        return "start"
    if args.adapters or getattr(args, "mcore_adapter", None):
        raise UsageError(
            "--adapters: the reference would be the model without them; give the same directory with --ref_adapters, merge "
            "them first, or give --ref_model"
        )
    return "adapters off" if args.adapts else "start"


def pair_loss(args: DpoArguments) -> PairLoss:
    assert args.beta is not None  # after __post_init__
    return PairLoss(args.loss_type, args.beta, args.label_smoothing, args.rpo_alpha, args.simpo_gamma)


def kto_loss(args: DpoArguments) -> KtoLoss:
    assert args.beta is not None  # after __post_init__
    return KtoLoss(args.loss_type, args.beta, args.desirable_weight, args.undesirable_weight)


def check_reference(args: DpoArguments, rows: int | None, policy_rows: int | None) -> None:
    """Args: rows, policy_rows: of the vocabularies. Raises: UsageError if they differ."""
    if rows != policy_rows:
        raise UsageError(
            f"--ref_model {args.ref_model}: has {rows} rows in its vocabulary, the model has {policy_rows}; the reference "
            "must read the same tokens"
        )
