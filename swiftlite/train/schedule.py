"""Learning rates and weight decay on the Hugging Face side, by megatron-core's formulas."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Sequence
from itertools import islice

import torch

from swiftlite.arguments.train import BITSANDBYTES, SftArguments, TrainArguments
from swiftlite.arguments.train import OPTIMIZERS as BUILT_IN
from swiftlite.train.plugins import OPTIMIZERS, registered
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


def build_optimizer(model: torch.nn.Module, args: SftArguments) -> torch.optim.Optimizer:
    """--optim with --adam_* settings; vectors (biases, norms) do not decay, as on Megatron."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lr = args.lr or 0.0
    faster = {name for name in trained if args.loraplus_lr_ratio is not None and ".lora_B." in name}
    groups: list[Json] = [
        {"params": [p for n, p in trained.items() if p.dim() >= 2 and n not in faster]},
        {"params": [trained[name] for name in trained if name in faster], "lr": lr * (args.loraplus_lr_ratio or 0)},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: Json = {
        "lr": lr, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_eps, "weight_decay": args.weight_decay,
    }  # fmt: skip
    if args.optim in BITSANDBYTES:
        kind = getattr(importlib.import_module("bitsandbytes").optim, BITSANDBYTES[args.optim])
        optimizer: torch.optim.Optimizer = kind(groups, **settings)
    elif args.optim == "muon":
        optimizer = Muon(groups, _of_layers(model), settings)
    elif args.optim not in BUILT_IN:
        decay = {"lr": lr, "weight_decay": args.weight_decay}
        optimizer = registered(OPTIMIZERS, args.optim, "optim")([{**decay, **group} for group in groups], args)
    else:
        optimizer = torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **settings)
    optimizer.register_step_pre_hook(_zero_missing_gradients)
    return optimizer


def _of_layers(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Matrices that are neither embedding nor output layer."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    named = model.named_parameters()
    return {
        p for n, p in named
        if p.dim() == 2 and id(p) not in embeddings and not {"lm_head", "embed_out"} & set(n.split("."))
    }  # fmt: skip


class Muon(torch.optim.Optimizer):
    """torch's Muon for some matrices, AdamW for the rest, as one optimizer: steps of Muon are as long as AdamW's."""

    def __init__(self, groups: Sequence[Json], matrices: Collection[torch.nn.Parameter], adam: Json) -> None:
        parts: tuple[list[Json], list[Json]] = ([], [])
        for group in groups:
            for part, is_matrix in zip(parts, (True, False), strict=True):
                chosen = [p for p in group["params"] if (p in matrices) is is_matrix]
                if chosen:
                    part.append({**group, "params": chosen})
        common = {name: adam[name] for name in ("lr", "weight_decay")}
        self.parts: list[torch.optim.Optimizer] = []
        if parts[0]:
            self.parts.append(torch.optim.Muon(parts[0], adjust_lr_fn="match_rms_adamw", **common))
        if parts[1]:
            self.parts.append(torch.optim.AdamW(parts[1], fused=torch.cuda.is_available(), **adam))
        super().__init__([group for part in self.parts for group in part.param_groups], common)
        self._share()

    def _share(self) -> None:
        """The parts' groups and states are those of the whole, which schedules, scalers and checkpoints see."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = list(islice(groups, len(part.param_groups)))

    def load_state_dict(self, state_dict: Json) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        for part in self.parts:
            part.step()


def _zero_missing_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """An expert that no token reached has gradients of zero on Megatron and with transformers 5, and none with 4.57.

    Adam passes over what has no gradient: such an expert would neither decay nor continue with its momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
