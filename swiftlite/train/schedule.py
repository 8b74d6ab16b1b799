"""Learning rates and weight decay on the Hugging Face side, by megatron-core's formulas."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch

from swiftlite.arguments.train import TrainArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Json


def warmup_and_decay(args: TrainArguments, steps: int) -> tuple[int, int]:
    """Steps that warm up, and the step at which --min_lr is reached.

    A share of the steps rounds up, as transformers' TrainingArguments.get_warmup_steps does, and may be all of them.
    Raises: UsageError if --lr_warmup_iters take all of the schedule.
    """
    decay = args.lr_decay_iters or steps
    if args.lr_warmup_fraction is not None:
        warmup = math.ceil(decay * args.lr_warmup_fraction)
        return warmup, max(decay, warmup + 1)  # megatron-core wants a step after the warm-up
    if args.lr_warmup_iters >= decay:
        raise UsageError(f"{args.lr_warmup_iters} warm-up steps: must be fewer than the {decay} steps of the schedule")
    return args.lr_warmup_iters, decay


def wsd_steps(args: TrainArguments, decay: int) -> int:
    """Steps at the end of --lr_decay_style WSD in which the rate falls, of a schedule of `decay` steps."""
    return min(args.lr_wsd_decay_iters or math.ceil(decay / 10), decay)


# Share of the way down that is left, by the share of the steps that is done.
_KEPT: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (math.cos(math.pi * done) + 1),
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}


def lr_schedule(args: TrainArguments, steps: int) -> Callable[[int], float]:
    """Share of --lr at a step (from 0), by the formula of megatron-core's OptimizerParamScheduler.

    Raises: as warmup_and_decay.
    """
    warmup, decay = warmup_and_decay(args, steps)
    lowest = args.min_lr / args.lr if args.lr else 0.0

    def share(step: int) -> float:
        if warmup > 0 and step <= warmup:
            return step / warmup
        if args.lr_decay_style == "constant":
            return 1.0
        if step > decay:
            return lowest
        if args.lr_decay_style == "inverse-square-root":
            return max(lowest, math.sqrt(warmup / step))
        if args.lr_decay_style == "WSD":
            begin = decay - wsd_steps(args, decay)
            kept = 1.0 if step <= begin else _KEPT[args.lr_wsd_decay_style]((step - begin) / (decay - begin))
        else:
            kept = _KEPT[args.lr_decay_style]((step - warmup) / (decay - warmup))
        return lowest + kept * (1 - lowest)

    return share


def build_optimizer(model: torch.nn.Module, args: TrainArguments) -> torch.optim.Optimizer:
    """AdamW with --adam_* settings; vectors (biases, norms) do not decay, as on Megatron."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    settings: Json = {"lr": args.lr or 0.0, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps}
    groups = [group for group in groups if group["params"]]
    if "8bit" in args.optim:
        optimizer: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
    optimizer.register_step_pre_hook(_zero_missing_gradients)
    return optimizer


def _zero_missing_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """An expert that no token reached has gradients of zero on Megatron and with transformers 5, and none with 4.57.

    Adam passes over what has no gradient: such an expert would neither decay nor continue with its momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
