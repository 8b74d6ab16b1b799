"""Optimizer, schedule and loss scale of a model in training, and what checkpoints hold of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.model.adapters import hold_beginnings
from swiftlite.llm.model.tuner import trained_weights
from swiftlite.llm.train.saving import OPTIMIZER, SCALER, SCHEDULER, SHARDED_OPTIMIZER
from swiftlite.llm.train.sharding import load_optimizer, save_optimizer
from swiftlite.train.checkpoints import Start
from swiftlite.train.flops import ModelFlops
from swiftlite.train.schedule import build_optimizer, lr_schedule
from swiftlite.utils.dist import get_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Optimization:
    """wrapped: the model as it is run, so that gradients are added up over ranks."""

    def __init__(self, model: PreTrainedModel, args: SftArguments, accelerator: Accelerator, steps: int) -> None:
        self.model, self.args = model, args
        self.accelerator = accelerator
        optimizer = build_optimizer(model, args)
        if args.begins_with_weights and not args.adapters:
            hold_beginnings(model, optimizer, args.lora_rank)
        if args.fsdp:
            self.wrapped, self.optimizer = model, accelerator.prepare(optimizer)
        else:
            self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_schedule(args, steps))

    def trained_weights(self, flops: ModelFlops) -> dict[str, float | None]:
        """`trained` and `adapters` of ModelFlops.training."""
        return trained_weights(self.model, flops)

    def save(self, directory: Path) -> None:
        """Into a checkpoint's directory. Collective."""
        if self.args.fsdp:
            save_optimizer(self.model, self.optimizer, directory)
        if get_rank() != 0:
            return
        if not self.args.fsdp:
            torch.save(self.optimizer.state_dict(), directory / OPTIMIZER)
        torch.save(self.scheduler.state_dict(), directory / SCHEDULER)
        if self.accelerator.scaler is not None:
            torch.save(self.accelerator.scaler.state_dict(), directory / SCALER)

    def load(self, start: Start) -> None:
        """Of a checkpoint that lacks one of them, the other; the learning rate is the step's in any case."""
        there = {n for n in (OPTIMIZER, SHARDED_OPTIMIZER, SCHEDULER, SCALER) if (start.directory / n).is_file()}

        def stored(name: str) -> Any:
            return torch.load(start.directory / name, map_location="cpu", weights_only=True)

        if SHARDED_OPTIMIZER in there or (OPTIMIZER in there and self.args.fsdp):
            load_optimizer(self.model, self.optimizer, start.directory)
        elif OPTIMIZER in there:
            self.optimizer.load_state_dict(stored(OPTIMIZER))
        if SCHEDULER in there and there & {OPTIMIZER, SHARDED_OPTIMIZER}:
            self.scheduler.load_state_dict(stored(SCHEDULER))
        else:
            self.scheduler.last_epoch = start.step
        self.scheduler.last_epoch -= 1  # step() sets the rates, by the schedule of this run, which may be longer
        self.optimizer._opt_called = True  # silences a warning about the order of calls
        self.scheduler.step()
        if self.accelerator.scaler is not None and SCALER in there:
            self.accelerator.scaler.load_state_dict(stored(SCALER))
