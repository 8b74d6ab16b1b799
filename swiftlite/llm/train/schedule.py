"""Learning rates and weight decay on the Hugging Face side, by megatron-core's formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from swiftlite.utils.errors import UsageError


def lr_schedule(args: Any, steps: int) -> Callable[[int], float]:
    """Share of --lr at a step (from 0), by the formula of megatron-core's OptimizerParamScheduler.

    Raises: UsageError if the warm-up takes the whole run.
    """
    decay = args.lr_decay_iters or steps
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else int(args.lr_warmup_fraction * decay)
    if warmup >= decay:
        raise UsageError(f"{warmup} warm-up steps: must be fewer than the {decay} steps of the schedule")
    lowest = args.min_lr / args.lr if args.lr else 0.0

    def share(step: int) -> float:
        if warmup > 0 and step <= warmup:
            return step / warmup
        if args.lr_decay_style == "constant":
            return 1.0
        if step > decay:
            return lowest
        done = (step - warmup) / (decay - warmup)
        kept = 1 - done if args.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
        return lowest + kept * (1 - lowest)

    return share


def build_optimizer(model: torch.nn.Module, args: Any) -> torch.optim.AdamW:
    """AdamW with --adam_* settings; vectors (biases, norms) do not decay, as on Megatron."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.lr,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_eps,
        fused=torch.cuda.is_available(),
    )
