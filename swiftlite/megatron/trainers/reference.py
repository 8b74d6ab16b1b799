"""The reference of preference training: the model as training began, --ref_model, or with LoRA the policy without its
adapters: no model of its own."""

from __future__ import annotations

import copy
from pathlib import Path

from megatron.core.transformer.module import MegatronModule

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint, checkpoint_root
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.registry import get_model_info_meta
from swiftlite.checkpoint.vocabulary import grown, rows_of
from swiftlite.megatron.hf_io import load_weights
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.trainers.wrapping import in_precision
from swiftlite.megatron.tuners.lora import prepare_lora
from swiftlite.train.reference import check_reference, reference_kind
from swiftlite.utils.directories import Directory


def reference_of(args: MegatronDpoArguments, origin: Path) -> tuple[Path, MegatronDpoArguments | None]:
    """(directory of the reference's weights, arguments that build its model; None: the policy without adapters).

    Raises: UsageError if --ref_model has another vocabulary, or if the policy begins with adapters and it is missing.
    """
    kind = reference_kind(args)
    if kind in ("none", "adapters off"):
        return origin, None
    other = copy.copy(args)  # the same run, of another model or with other adapters
    other.adapters, other.mcore_adapter = [args.ref_adapters] if args.ref_adapters else [], None
    if kind == "start":
        return origin, other
    return other_model(args, other, "ref_model", str(args.ref_model), origin)


def other_model(
    args: MegatronDpoArguments, other: MegatronDpoArguments, flag: str, given: str, origin: Path
) -> tuple[Path, MegatronDpoArguments]:
    """(directory, `other` made to build it) of a model that a flag names. Raises: UsageError for another vocabulary."""
    directory = Path(given).expanduser()
    if not Directory(directory).is_megatron:
        info, _ = get_model_info_meta(
            given, use_hf=args.use_hf, hub_token=args.hub_token, need_template=False,
            ignore_requirements=args.ignore_requirements,
        )  # fmt: skip
        directory = Path(info.model_dir)
    stated, model = read_config(checkpoint_root(directory)), read_config(checkpoint_root(origin))
    same = rows_of(stated) == rows_of(model)
    config = convert_hf_config(grown(stated, args.new_tokens if same else None))
    check_reference(flag, given, config["padded_vocab_size"], args.description.padded_vocab_size)
    other.apply_model_config(config)
    return directory, other


def build_reference(args: MegatronDpoArguments, directory: Path, variable_lengths: bool) -> list[MegatronModule]:
    """Its model chunks on this rank, in the dtype of the run, with its weights. Collective. args: see reference_of."""
    models = build_models(args, variable_seq_lengths=variable_lengths)
    source = Checkpoint.open(directory, new_tokens=args.new_tokens)
    if args.adapters:
        prepare_lora(models, source, args)
    reference = [in_precision(model).requires_grad_(False).eval() for model in models]
    load_weights(reference, source, args.allow_overflow)
    return reference
