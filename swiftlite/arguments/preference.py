"""Arguments of training on preference pairs (`swiftlite dpo`, `swiftlite rlhf --rlhf_type dpo`, kto, rm, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from swiftlite.arguments.flags import DPO_NOTES, OTHER_PREFERENCES
from swiftlite.arguments.parser import Note, arguments, field, run_setting, specs
from swiftlite.arguments.task import (
    KTO_LOSS_TYPES,
    MIXABLE,
    PAIR_LOSS_TYPES,
    REFERENCE_FREE,
    TeacherArguments,
)
from swiftlite.arguments.train import SftArguments
from swiftlite.utils.errors import UsageError

_OF_KTO = ("desirable_weight", "undesirable_weight")
_OF_GKD = ("teacher_model", "teacher_logits", "lmbda", "temperature", "sft_alpha")
SMOOTHED = ("sigmoid", "robust", "cpo", "simpo")


@arguments
class PreferenceArguments(TeacherArguments, SftArguments):
    """Preference: the loss on pairs, and the reference that the policy is held to"""

    rlhf_type: str = field(
        "dpo", "dpo (a loss of --loss_type on pairs), cpo, simpo, orpo (those losses, without a reference), kto (answers "
        "that are each desirable or not), gkd (distillation from --teacher_model or --teacher_logits), rm (a reward model)",
        unavailable={
            "DpoArguments": Note("default only", OTHER_PREFERENCES, (*REFERENCE_FREE, "kto", "gkd", "rm")),
        },
    )  # fmt: skip
    beta: float | None = field(
        None,
        "strength of the pull to the reference (default: 0.1, simpo 2); of gkd the kind of divergence: 0 forward KL, "
        "1 reverse KL, 0.5 (default) Jensen-Shannon",
        aliases=["pref_beta"],
        common=True,
    )
    desirable_weight: float = field(1.0, "with --rlhf_type kto: weight of the desirable answers' losses", least=0)
    undesirable_weight: float = field(1.0, "with --rlhf_type kto: weight of the undesirable answers' losses", least=0)
    label_smoothing: float = field(
        0.0, f"probability that a preference is wrong, 0 to 0.5; for {', '.join(SMOOTHED)}", least=0, most=0.5
    )
    rpo_alpha: float | None = field(
        None, "weight of the chosen answers' cross entropy that is added (default: none; cpo, simpo, orpo 1)",
        aliases=["pref_ftx", "cpo_alpha"], least=0,
    )  # fmt: skip
    loss_weights: list[str] = field(
        [], "several losses of --loss_type added up (MPO), sft being the chosen answers' cross entropy: a number for each, "
        "or sigmoid=0.8 bco_pair=0.2 sft=1; without it 1 each",
    )  # fmt: skip
    simpo_gamma: float = field(1.0, "margin between the two answers that --loss_type simpo asks for")
    center_rewards_coefficient: float | None = field(
        None, "with --rlhf_type rm: weight of the squared sum of a pair's scores, which pulls them to 0", least=0,
    )  # fmt: skip
    ref_model: str | None = field(
        None, "directory or id of the reference (default: the start weights; with LoRA the model without adapters)",
        path=True, common=True,
    )  # fmt: skip
    ref_adapters: str | None = field(
        None, "directory of the adapters that the reference has: on --ref_model, or on the model as it is without adapters; "
        "a model of its own in memory", aliases=["ref_model_adapters", "mcore_ref_adapter"], path=True,
    )  # fmt: skip
    precompute_ref_log_probs: bool = run_setting(
        False,
        "the reference answers the whole dataset once before training, then its memory is free; a run with the same "
        "data and reference finds the answers in ~/.cache/swiftlite, or $SWIFTLITE_CACHE",
    )
    teacher_logits: str | None = field(
        None, "with --rlhf_type gkd: directory that `export --to_teacher_logits true` wrote, in place of the teacher",
        path=True,
    )  # fmt: skip
    lmbda: float = field(
        0.0, "with --rlhf_type gkd: share of answers that the student writes itself",
        unavailable="the student's own answers would have to be written while it trains, which needs an inference engine: "
        "TRL's GKDTrainer or ms-swift do that; --lmbda 0 learns on the data's answers",
    )  # fmt: skip
    sft_alpha: float = field(0.0, "with --rlhf_type gkd: weight of the answers' cross entropy, which is added", least=0)

    @property
    def has_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE and self.rlhf_type not in ("gkd", "rm")

    @property
    def trains_reward_model(self) -> bool:
        return self.rlhf_type == "rm"

    @property
    def loss_types(self) -> tuple[str, ...]:
        others = {"rm": (), "gkd": (), "kto": KTO_LOSS_TYPES}
        return others.get(self.rlhf_type, PAIR_LOSS_TYPES)

    @property
    def trained_for(self) -> str:
        return f"--rlhf_type {self.rlhf_type}"

    @property
    def reads_labels(self) -> bool:
        return False

    @property
    def pools(self) -> bool:
        return False

    @property
    def mixture(self) -> dict[str, float]:
        """Weights of several losses; empty where there is one."""
        return {name: float(weight) for name, _, weight in (item.partition("=") for item in self.loss_weights)}

    def __post_init__(self) -> None:
        given: object = self.loss_type
        several = [str(name) for name in given] if isinstance(given, list) and len(given) > 1 else []
        if several:
            self.loss_type = next((name for name in several if name != "sft"), several[0])
        super().__post_init__()
        if several or self.loss_weights:
            self._mix(several)
        if self.trains_reward_model:
            return self._settle_reward_model()
        if self.center_rewards_coefficient is not None:
            raise UsageError("--center_rewards_coefficient: goes with --rlhf_type rm only")
        if self.rlhf_type == "gkd":
            return self._settle_gkd()
        if self.rlhf_type == "kto":
            self._settle_kto()
        elif self.rlhf_type != "dpo":
            if self.loss_type is not None and self.loss_type != self.rlhf_type:
                raise UsageError(
                    f"--loss_type {self.loss_type}: --rlhf_type {self.rlhf_type} has its own; leave it out"
                )
            self.loss_type = self.rlhf_type
        if self.loss_type is None:
            self.loss_type = "sigmoid"
        if self.beta is None:
            self.beta = 2.0 if self.loss_type == "simpo" else 0.1
        if self.rpo_alpha is None and not self.has_reference:
            self.rpo_alpha = 1.0
        self._check_loss()

    def _mix(self, names: list[str]) -> None:
        """--loss_weights becomes `name=weight` of each loss. names: of several that --loss_type gave."""
        said = f"--loss_type {' '.join(names)} --loss_weights {' '.join(self.loss_weights)}"
        named = all("=" in item for item in self.loss_weights)
        if not names and named:
            names = [item.partition("=")[0] for item in self.loss_weights]
        weights = [item.rpartition("=")[2] for item in self.loss_weights] or ["1"] * len(names)
        if self.rlhf_type != "dpo":
            raise UsageError(f"{said}: losses are added up with --rlhf_type dpo only")
        unknown = [name for name in names if name not in (*MIXABLE, "sft")]
        if unknown or len(set(names)) != len(names) or len(names) < 2:
            raise UsageError(f"{said}: must be two or more of {', '.join(MIXABLE)}, sft, each of them once")
        if len(weights) != len(names) or not all(_is_weight(weight) for weight in weights):
            raise UsageError(f"{said}: give a number for each of the {len(names)} losses, 0 or more")
        if "sft" in names and self.rpo_alpha:
            raise UsageError(
                f"--rpo_alpha {self.rpo_alpha}: is the weight of sft, which --loss_weights gives; leave it out"
            )
        self.loss_type = next(name for name in names if name != "sft")
        self.loss_weights = [f"{name}={weight}" for name, weight in zip(names, weights, strict=True)]

    def _settle_gkd(self) -> None:
        other = {"loss_type", "label_smoothing", "rpo_alpha", "simpo_gamma", "ref_model", "ref_adapters", *_OF_KTO}
        for name in sorted(other | {"precompute_ref_log_probs"}):
            if getattr(self, name) != specs(type(self))[name].default:
                raise UsageError(f"--{name}: has no meaning with --rlhf_type gkd; leave it out")
        if (self.teacher_model is None) == (self.teacher_logits is None):
            raise UsageError(
                "--rlhf_type gkd: give the teacher with --teacher_model DIR_OR_ID, or what it said before with "
                "--teacher_logits DIR (`swiftlite export --to_teacher_logits true` writes it)"
            )
        self.beta = 0.5 if self.beta is None else self.beta
        if not 0 <= self.beta <= 1:
            raise UsageError(f"--beta {self.beta}: with --rlhf_type gkd it is between 0 and 1")

    def _settle_kto(self) -> None:
        if self.loss_type is None:
            self.loss_type = "kto"
        if self.rpo_alpha is not None:
            raise UsageError(f"--rpo_alpha {self.rpo_alpha}: --rlhf_type kto adds no cross entropy; leave it out")

    def _settle_reward_model(self) -> None:
        """A model with one number for its answer to a conversation."""
        names = ("beta", "label_smoothing", "rpo_alpha", "simpo_gamma", "ref_model", "ref_adapters",
                 "precompute_ref_log_probs", *_OF_KTO, *_OF_GKD)  # fmt: skip
        given = next((name for name in names if name in self.given and getattr(self, name)), None)
        if given:
            raise UsageError(f"--{given}: --rlhf_type rm has no reference and one loss; leave it out")
        self.task_type, self.num_labels = "seq_cls", 1
        self.problem_type = "regression"

    def _check_loss(self) -> None:
        for kind, names in (("kto", _OF_KTO), ("gkd", _OF_GKD)):
            for name in names:
                if name in self.given and self.rlhf_type != kind:
                    raise UsageError(f"--{name}: goes with --rlhf_type {kind} only")
        divides = bool({self.loss_type, *self.mixture} & {"ipo", "sppo_hard"})
        if self.beta is None or self.beta < 0 or (self.beta == 0 and (divides or not self.rpo_alpha)):
            way = "" if divides else "; 0 leaves the cross entropy of --rpo_alpha alone, which would have to be given"
            raise UsageError(f"--beta {self.beta}: must be above 0 with --loss_type {self.loss_type}{way}")
        kinds = {self.loss_type, *self.mixture}
        if self.label_smoothing and not kinds & set(SMOOTHED):
            raise UsageError(
                f"--label_smoothing {self.label_smoothing}: goes with --loss_type {', '.join(SMOOTHED)} only"
            )
        if "robust" in kinds and self.label_smoothing >= 0.5:
            raise UsageError(f"--label_smoothing {self.label_smoothing}: --loss_type robust divides by 1 - 2 x it")
        if "simpo_gamma" in self.given and self.loss_type != "simpo":
            raise UsageError("--simpo_gamma: goes with --loss_type simpo only")
        if self.has_reference:
            return
        for name in ("ref_model", "ref_adapters", "precompute_ref_log_probs"):
            if getattr(self, name):
                raise UsageError(f"--{name}: --loss_type {self.loss_type} has no reference; leave it out")


def _is_weight(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False


@arguments
class DpoArguments(PreferenceArguments):
    """Direct preference optimisation

    Rows have `messages` and `rejected_messages` (or `rejected_response`, `chosen` and `rejected`, ...).
    """

    NOTES: ClassVar[Mapping[str, Note]] = DPO_NOTES

    @property
    def directory_kinds(self) -> dict[str, tuple[str, ...]]:
        return {
            **super().directory_kinds,
            "ref_model": ("is_hf",),
            "ref_adapters": ("is_peft",),
            "teacher_model": ("is_hf",),
            "teacher_logits": ("is_teacher_logits",),
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rlhf_type == "gkd":  # the data is that of sft
            return
        if "loss_scale" not in self.given:
            self.loss_scale = "last_round"  # the turns before the last answer are the same in both
        if self.loss_scale not in ("default", "last_round", "all"):
            raise UsageError(f"--loss_scale {self.loss_scale}: preference training takes default, last_round or all")
        if self.truncation_strategy == "split":
            raise UsageError("--truncation_strategy split: a pair cannot be divided; use delete, left or right")
        if self.streaming:
            raise UsageError("--streaming true: not available for preference pairs; leave it out")
        if self.packing_strategy == "sequential":
            raise UsageError("--packing_strategy sequential: pairs are packed by best fit; leave it out")
        if self.rlhf_type == "kto" and self.loss_scale == "all":
            raise UsageError(
                "--loss_scale all: --rlhf_type kto must know where answers begin; use last_round or default"
            )
        if self.packing and self.group_by_length:
            raise UsageError("--packing true: packed sequences have one length; leave out --group_by_length")
