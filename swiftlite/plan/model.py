"""The model of a training command, and the frozen one beside it, as the formulas of memory.py need them.

Read from config.json and the names of tensors; no weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.preference import PreferenceArguments
from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.head import trained_config
from swiftlite.checkpoint.hub import local_directory
from swiftlite.checkpoint.registry import get_model_info_meta
from swiftlite.plan.memory import DIVERGENCE_BYTES, TrainingModel
from swiftlite.utils.directories import Directory
from swiftlite.weights.rule import BoundMap

# Hugging Face module -> rank, of a run that trains only adapters; Hugging Face names, of one that freezes the others.
Adapters = Callable[[BoundMap], Mapping[str, int] | None]
Trained = Callable[[BoundMap], Collection[str] | None]


def source_of(args: MegatronSftArguments, origin: str | Path) -> Checkpoint:
    """Of the weights, which are not read: config.json is held against the tensors that are there, if there are some."""
    return Checkpoint.open(Path(origin), weights=bool(args.mcore_model) or any(Path(origin).glob("*.safetensors")))


def training_model(
    args: MegatronSftArguments, source: Checkpoint, adapters: Adapters, trained: Trained
) -> TrainingModel:
    bound = bind_map(trained_config(args, source.config), source.names)
    model = TrainingModel(bound, args, args.dtype or torch.float32, adapters=adapters(bound), trained=trained(bound))
    return _compared(args, model) if isinstance(args, PreferenceArguments) else model


def _compared(args: PreferenceArguments, model: TrainingModel) -> TrainingModel:
    """A model that is trained on pairs, or held against another one."""
    pairs = args.rlhf_type not in ("kto", "gkd") and not args.packing
    loss = DIVERGENCE_BYTES["top" if args.teacher_logits else "kl" if args.beta in (0, 1) else "mixture"]
    return replace(
        model, sequences=2 if pairs else 1, beside=_beside(args, model.bound),
        loss_bytes=loss if args.rlhf_type == "gkd" else None,
    )  # fmt: skip


def _beside(args: PreferenceArguments, bound: BoundMap) -> BoundMap | None:
    """The reference of preferences, or the teacher of distillation, if it is a model of its own during training."""
    named = args.teacher_model
    if args.has_reference and not args.precompute_ref_log_probs:
        if args.ref_model is None:
            return bound if args.ref_adapters or not args.adapts else None
        named = args.ref_model
    if named is None:
        return None
    directory = local_directory(named)
    if directory is None:
        info, _ = get_model_info_meta(
            named, use_hf=args.use_hf, hub_token=args.hub_token, need_template=False, download_model=False,
            ignore_requirements=args.ignore_requirements,
        )  # fmt: skip
        directory = info.model_dir
    found = Directory(Path(directory))
    source = Checkpoint.open(Path(directory), weights=found.is_megatron or found.has("*.safetensors"))
    return bind_map(source.config, source.names)
