"""From arguments to what a run on megatron-core is, and what `--dry_run true` says of it. Imports no megatron-core."""

from __future__ import annotations

import os

import torch

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import checkpoint_root
from swiftlite.checkpoint.head import trained_config
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.resolve import resolve
from swiftlite.llm.dataset.rows import check_sources
from swiftlite.llm.pipeline import plan_tokens
from swiftlite.megatron.tuners.freeze import plan_freeze
from swiftlite.megatron.tuners.lora_plan import plan_lora
from swiftlite.plan.report import Adapters, Trained, out_of_memory, print_training
from swiftlite.train.order import Data
from swiftlite.train.run_directory import default_output_dir
from swiftlite.utils.dist import get_world_size
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger

logger = get_logger()


def resolve_run(args: MegatronSftArguments) -> str:
    """Find model, weights and template, fill in the model's fields and what follows from them. Collective-free.

    Returns: the directory that the weights come from.
    """
    if not hasattr(args, "model_info"):
        resolve(args)
    origin = os.path.expanduser(args.mcore_model) if args.mcore_model else args.model_info.model_dir
    config = read_config(checkpoint_root(origin))
    args.new_tokens = plan_tokens(args, config)  # type: ignore[attr-defined]
    args.apply_model_config(convert_hf_config(trained_config(args, config)))
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        if args.description.num_experts or args.description.multi_latent_attention:
            logger.info("--sequence_parallel true: tensor-parallel training of this model needs it")
            args.sequence_parallel = True
    if args.output_dir is None:
        args.output_dir = default_output_dir(args, "megatron_output")
    return origin


def print_run(args: MegatronSftArguments, origin: str) -> None:
    """The plan of a run. origin: as resolve_run returns it."""
    check_sources(args)
    print_training(args, origin, *_trained(args))


def explain_out_of_memory(args: MegatronSftArguments, origin: str, data: Data) -> UsageError:
    """Why a step does not fit and what would; `data` are (training set, validation set or None)."""
    known = [max(part.lengths) for part in data if part is not None and hasattr(part, "lengths")]
    length = max(known, default=int(args.seq_length or 0))
    available = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    return UsageError(out_of_memory(args, origin, *_trained(args), get_world_size(), length, available))


def _trained(args: MegatronSftArguments) -> tuple[Adapters, Trained]:
    lora = args.train_type == "lora"
    return (
        lambda bound: plan_lora(bound, args).ranks if lora else None,
        lambda bound: () if args.skip_train else plan_lora(bound, args).whole if lora else plan_freeze(bound, args),
    )
