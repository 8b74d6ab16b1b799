"""What preference training compares its model with, on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from swiftlite.arguments.base import BaseArguments
from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.registry import get_model_info_meta
from swiftlite.train.distill_loss import Divergence
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
    assert args.beta is not None and args.loss_type is not None  # after __post_init__
    mixture = args.mixture
    rpo_alpha = mixture.pop("sft", args.rpo_alpha)
    return PairLoss(args.loss_type, args.beta, args.label_smoothing, rpo_alpha, args.simpo_gamma, mixture)


def kto_loss(args: DpoArguments) -> KtoLoss:
    assert args.beta is not None and args.loss_type is not None  # after __post_init__
    return KtoLoss(args.loss_type, args.beta, args.desirable_weight, args.undesirable_weight)


def model_directory(args: BaseArguments, given: str) -> Path:
    """Of a model beside the one in training: what a flag names, or what a hub's id comes to."""
    directory = Path(given).expanduser()
    if directory.is_dir():
        return directory
    info, _ = get_model_info_meta(
        given,
        use_hf=args.use_hf,
        hub_token=args.hub_token,
        need_template=False,
        ignore_requirements=args.ignore_requirements,
    )
    return Path(info.model_dir)


def divergence(args: DpoArguments) -> Divergence:
    assert args.beta is not None  # after __post_init__
    return Divergence(args.beta, args.temperature)


def check_teacher(teacher: str, own: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Args: teacher: as it was named. own, theirs: vocabularies of the tokenizers. Raises: UsageError if they differ."""
    if dict(own) != dict(theirs):
        token = next(iter(dict(own).items() ^ dict(theirs).items()))[0]
        raise UsageError(
            f"--teacher_model {teacher}: its tokenizer has another vocabulary ({token!r}, for one); what it says of the "
            "next token can be learnt only by a model that has the same tokens: take a teacher of the same family"
        )


def check_teacher_rows(teacher: str, rows: int, own: Mapping[str, int]) -> None:
    """Args: rows: of the vocabulary that a model, or student and teacher, have; those that no token has may be missing.

    Raises: UsageError if there are tokens without one.
    """
    if rows <= max(own.values()):
        raise UsageError(f"--teacher_model {teacher}: its vocabulary, or the model's, lacks rows for some tokens")


def check_reference(flag: str, given: str, rows: int | None, policy_rows: int | None) -> None:
    """Args: flag, given: of the other model. rows, policy_rows: of the vocabularies. Raises: UsageError if they differ."""
    if rows != policy_rows:
        raise UsageError(
            f"--{flag} {given}: has {rows} rows in its vocabulary, the model has {policy_rows}; it must read the same tokens"
        )
