"""`swiftlite megatron sft` and `pt`: training on tokens, on megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronPtArguments, MegatronSftArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.groups import load_groups
from swiftlite.llm.dataset.prepare import load_data
from swiftlite.megatron.trainers.base import Trainer
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.classification import ClassificationTrainer
from swiftlite.megatron.trainers.grouped import trainer_of
from swiftlite.megatron.trainers.loss import LossFunction, language_model_loss, token_losses
from swiftlite.megatron.trainers.run import run
from swiftlite.train.channels import Channels
from swiftlite.train.loop import Run
from swiftlite.train.order import Data
from swiftlite.train.plugins import token_loss_of
from swiftlite.utils.types import Json


class SftTrainer(Trainer):
    """Cross entropy on the answers' tokens, a mean over those of the global batch."""

    sums: tuple[str, ...] = ("loss", "trained_tokens")
    channels: Channels | None = None

    def see(self, data: Data) -> None:
        token_loss_of(self.args)  # a wrong name is told before the model is built
        if self.args.enable_channel_loss:
            self.channels = Channels.of(data)
            self.sums = (*self.sums, *self.channels.sum_names)

    def setup(self, run: Run) -> None:
        super().setup(run)
        for loader in filter(None, (self.train_loader, self.val_loader)):
            loader.channels = self.channels

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        per_token = self.args.calculate_per_token_loss or not model.training
        token_loss = token_loss_of(self.args) if model.training else None
        report = None
        if self.channels is not None and batch.channels is not None:
            report = partial(self.channels.sums, counted=batch.loss_mask != 0, channels=batch.channels)
        loss = partial(language_model_loss, batch.loss_mask, per_token=per_token, token_loss=token_loss, report=report)
        return token_losses(model, batch), loss

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        trained = torch.stack([(batch.loss_mask != 0).sum() for batch in batches]).sum()
        torch.distributed.all_reduce(trained, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return trained

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = {"loss": sums["loss"] / max(sums["trained_tokens"], 1.0)}
        return found | self.channels.metrics(sums) if self.channels else found


def megatron_sft_main(args: MegatronSftArguments | Sequence[str]) -> Json:
    """Train; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed (`["--model", "DIR", "--dataset", "FILE"]`).
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`; of a dry run `output_dir` only.
    Raises: SwiftliteError for everything a user can fix, before anything is written where possible.
    """
    args = as_arguments(MegatronSftArguments, args)
    if args.groups:
        return run(args, trainer_of(args.task_type), load_groups)
    return run(args, ClassificationTrainer if args.task_type == "seq_cls" else SftTrainer, load_data)


def megatron_pt_main(args: MegatronPtArguments | Sequence[str]) -> Json:
    """Continued pre-training: plain `text` rows, each ended by the end token, packed; all tokens are trained on."""
    return run(as_arguments(MegatronPtArguments, args), SftTrainer, load_data)
