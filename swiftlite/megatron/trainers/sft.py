"""`swiftlite megatron sft` and `pt`: training on tokens, on megatron-core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronPtArguments, MegatronSftArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import checkpoint_root
from swiftlite.checkpoint.hub import check_hub_id, push
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.resolve import as_arguments, resolve
from swiftlite.checkpoint.vocabulary import grown
from swiftlite.llm.dataset.prepare import check_sources, load_data
from swiftlite.llm.pipeline import plan_tokens, prepare_template
from swiftlite.llm.template.base import Template
from swiftlite.llm.template.trained import trained_chat
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.state import check_file, iteration_name
from swiftlite.megatron.trainers import run_directory
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossFunction, language_model_loss, token_losses
from swiftlite.megatron.trainers.saving import HF_SUFFIX
from swiftlite.megatron.tuners.freeze import plan_freeze
from swiftlite.megatron.tuners.lora_plan import plan_lora
from swiftlite.plan.report import print_training
from swiftlite.train.loop import Run, train
from swiftlite.train.order import Data
from swiftlite.train.run_directory import default_output_dir, name_version
from swiftlite.train.run_directory import held as hold_directory
from swiftlite.utils.dist import get_rank
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

logger = get_logger()
A = TypeVar("A", bound=MegatronSftArguments)


class SftTrainer(Trainer):
    """Cross entropy on the answers' tokens, a mean over those of the global batch."""

    sums = ("loss", "trained_tokens")

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        per_token = self.args.calculate_per_token_loss or not model.training
        return token_losses(model, batch), partial(language_model_loss, batch.loss_mask, per_token=per_token)

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        trained = torch.stack([(batch.loss_mask != 0).sum() for batch in batches]).sum()
        torch.distributed.all_reduce(trained, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return trained

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / max(sums["trained_tokens"], 1.0)}


def resolve_run(args: MegatronSftArguments) -> str:
    """Find model, weights and template, fill in the model's fields and what follows from them. Collective-free.

    Returns: the directory that the weights come from.
    """
    if not hasattr(args, "model_info"):
        resolve(args)
    origin = os.path.expanduser(args.mcore_model) if args.mcore_model else args.model_info.model_dir
    config = read_config(checkpoint_root(origin))
    args.new_tokens = plan_tokens(args, config)  # type: ignore[attr-defined]
    args.apply_model_config(convert_hf_config(grown(config, args.new_tokens)))
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        if args.description.num_experts or args.description.multi_latent_attention:
            logger.info("--sequence_parallel true: tensor-parallel training of this model needs it")
            args.sequence_parallel = True
    if args.output_dir is None:
        args.output_dir = default_output_dir(args, "megatron_output")
    return origin


def megatron_sft_main(args: MegatronSftArguments | Sequence[str]) -> Json:
    """Train; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed (`["--model", "DIR", "--dataset", "FILE"]`).
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`; of a dry run `output_dir` only.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    return run(as_arguments(MegatronSftArguments, args), SftTrainer, load_data)


def megatron_pt_main(args: MegatronPtArguments | Sequence[str]) -> Json:
    """Continued pre-training: plain `text` rows, each ended by the end token, packed; all tokens are trained on."""
    return run(as_arguments(MegatronPtArguments, args), SftTrainer, load_data)


def run(args: A, trainer_class: type[Trainer], load: Callable[[A, Template], Data]) -> Json:
    """One run of any trainer. Called on every rank.

    Args: load: (args, template) -> training set, validation set or None.
    Returns, raises: as megatron_sft_main.
    """
    if args.push_to_hub:
        check_hub_id(args.hub_model_id)
    origin = resolve_run(args)
    if args.dry_run:
        check_sources(args)
        lora = args.train_type == "lora"
        print_training(
            args, origin,
            adapters=lambda bound: plan_lora(bound, args).ranks if lora else None,
            trained=lambda bound: None if lora else plan_freeze(bound, args),
        )  # fmt: skip
        return {"output_dir": args.output_dir}
    template = prepare_template(args)
    with ExitStack() as held:
        parallel = held.enter_context(parallel_groups(args))
        name_version(args)
        start = held.enter_context(hold_directory(args, run_directory.prepare))
        if start is not None:
            start.check(check_file)
        train_set, val_set = load(args, template)
        chat = trained_chat(template) if parallel.rank == 0 else None  # rank 0 writes it
        trainer = trainer_class(args, parallel, template.pad_token_id, origin, chat)
        training = Run(args, train_set, val_set, parallel.dp_rank, parallel.dp_size, trainer.metrics)
        result = train(training, trainer, start)
    # Without the groups: no rank waits for the network.
    if args.push_to_hub and get_rank() == 0 and not result["signal"]:
        newest = training.root / f"{iteration_name(result['iteration'])}{HF_SUFFIX}"
        push(newest, args.hub_model_id, use_hf=args.use_hf, token=args.hub_token, private=args.hub_private_repo)
    return result
