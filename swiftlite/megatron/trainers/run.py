"""One run on megatron-core, whatever it trains: what all commands do before, around and after the loop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.hub import check_hub_id, push
from swiftlite.llm.pipeline import prepare_template
from swiftlite.llm.template.base import Template
from swiftlite.llm.template.trained import trained_chat
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.state import check_file, hf_directory, iteration_name
from swiftlite.megatron.trainers import run_directory
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.machine import check_machine
from swiftlite.megatron.trainers.resolve import explain_out_of_memory, print_run, resolve_run
from swiftlite.train.loop import Run, evaluate, train
from swiftlite.train.order import Data
from swiftlite.train.run_directory import held as hold_directory
from swiftlite.train.run_directory import name_version
from swiftlite.utils.dist import get_rank
from swiftlite.utils.types import Json

A = TypeVar("A", bound=MegatronSftArguments)


def run(args: A, trainer_class: type[Trainer], load: Callable[[A, Template], Data]) -> Json:
    """One run of any trainer. Called on every rank.

    Args: load: (args, template) -> training set, validation set or None.
    Returns, raises: as megatron_sft_main.
    """
    if args.push_to_hub:
        check_hub_id(args.hub_model_id)
    origin = resolve_run(args)
    if args.dry_run:
        print_run(args, origin)
        return {"output_dir": args.output_dir}
    check_machine(args)
    template = prepare_template(args)
    with ExitStack() as held:
        parallel = held.enter_context(parallel_groups(args))
        start = None
        if args.skip_train:
            args.dataset, args.val_dataset = args.val_dataset, []  # one set of samples is read, and stands for both
            args.split_dataset_ratio = 0.0
        else:
            name_version(args)
            start = held.enter_context(hold_directory(args, run_directory.prepare))
        if start is not None:
            start.check(check_file)
        train_set, val_set = load(args, template)
        if args.skip_train:
            val_set = train_set  # type: ignore[assignment]  # nothing streams here
        chat = trained_chat(template) if parallel.rank == 0 else None  # rank 0 writes it
        trainer = trainer_class(args, parallel, template.pad_token_id, origin, chat)
        trainer.see((train_set, val_set))
        training = Run(args, train_set, val_set, parallel.dp_rank, parallel.dp_size, trainer.metrics)
        try:
            if args.skip_train:
                return evaluate(training, trainer)
            result = train(training, trainer, start)
        except torch.OutOfMemoryError as error:
            raise explain_out_of_memory(args, origin, (train_set, val_set)) from error
    # Without the groups: no rank waits for the network.
    if args.push_to_hub and get_rank() == 0 and not result["signal"]:
        newest = hf_directory(training.root / iteration_name(result["iteration"]))
        push(newest, args.hub_model_id, use_hf=args.use_hf, token=args.hub_token, private=args.hub_private_repo)
    return result
