"""What peft offers besides plain LoRA: other beginnings of its matrices, other adapters."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swiftlite.arguments.base import PEFT_TUNERS, TunerArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import nearest, one_line
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from peft import PeftConfig


# What peft calls a task; with SEQ_CLS it trains the head fully.
PEFT_TASKS = {
    "causal_lm": "CAUSAL_LM", "generative_reranker": "CAUSAL_LM", "seq_cls": "SEQ_CLS", "reranker": "SEQ_CLS",
    "embedding": "FEATURE_EXTRACTION",
}  # fmt: skip


def lora_size(args: TunerArguments) -> Json:
    """Rank and alpha for peft. An adapter that begins with a part of W has that part beside it, see `begin_with_weights`."""
    if not args.begins_with_weights:
        return {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
    factor = 2**0.5 if args.use_rslora else 2  # the scale stays
    return {"r": 2 * args.lora_rank, "lora_alpha": args.lora_alpha * factor}


def begin(adapted: nn.Module, args: TunerArguments) -> None:
    """Fill the pairs as --init_weights says; peft computes them, of each layer by itself.

    Where it takes B0 A0 out of W (PiSSA, OLoRA), W stays as it is here and -B0 A0 stands beside B A as a second half of
    the matrices, which `hold_beginnings` keeps: the same function of B and A, and what is saved is plain LoRA.
    """
    for name, module in adapted.named_modules():
        pair: Any = module
        if not hasattr(module, "lora_A") or "default" not in pair.lora_A:
            continue
        layer = pair.get_base_layer()
        if args.begins_with_weights and args.lora_rank > min(layer.weight.shape):
            raise UsageError(
                f"--lora_rank {args.lora_rank}: {name} has {min(layer.weight.shape)} singular values; use a lower rank"
            )
        if layer.weight.is_meta:  # a trial
            continue
        a, b = _beginning(layer, args)
        if args.begins_with_weights:
            a, b = torch.cat([a, a]), torch.cat([b, -b], dim=1)
        pair.lora_A["default"].weight.data.copy_(a)
        pair.lora_B["default"].weight.data.copy_(b)


def _beginning(layer: nn.Linear, args: TunerArguments) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) that peft gives a layer."""
    from peft import LoraConfig, get_peft_model

    alone = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, use_rslora=args.use_rslora, target_modules=["layer"],
        init_lora_weights=args.init_weights,  # type: ignore[arg-type]  # checked with the arguments
    )  # fmt: skip
    pair: Any = get_peft_model(nn.Sequential(OrderedDict(layer=copy.deepcopy(layer))), alone).get_submodule(
        "base_model.model.layer"
    )
    return pair.lora_A["default"].weight.data, pair.lora_B["default"].weight.data


def hold_beginnings(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Of pairs that `begin` doubled, the second half stays: no gradient, no weight decay."""
    halves: list[tuple[nn.Parameter, int]] = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            dim = 0 if ".lora_A." in name else 1
            trained = (torch.arange(2 * rank, device=parameter.device) < rank).view((-1, 1) if dim == 0 else (1, -1))
            parameter.register_hook(trained.mul)
            halves.append((parameter, dim))
    kept: list[Tensor] = []

    def before(*_: object) -> None:
        kept[:] = [p.detach().narrow(dim, rank, rank).clone() for p, dim in halves]

    def after(*_: object) -> None:
        for (parameter, dim), value in zip(halves, kept, strict=True):
            parameter.detach().narrow(dim, rank, rank).copy_(value)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def other_config(args: SftArguments, targets: list[str] | str, kept: list[str]) -> PeftConfig:
    """peft's config of a tuner that is not LoRA. Raises: UsageError for settings that it has not."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    make = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PEFT_TUNERS[args.train_type])]
    known = set(make.__dataclass_fields__)
    for name in args.tuner_settings:
        if name not in known:
            raise UsageError(
                f"--tuner_settings {name}: {make.__name__} of peft has no such setting{nearest(name, known)}"
            )
    task = PEFT_TASKS[args.task_type or "causal_lm"]
    own: Json = {"target_modules": targets, "modules_to_save": kept or None, "task_type": task}
    if args.train_type == "ia3" and args.target_modules == ["all-linear"]:
        del own["target_modules"]  # it is for a few layers, which peft knows of each model
    try:
        return make(**{**own, **args.tuner_settings})
    except (TypeError, ValueError) as error:
        raise UsageError(f"--tuner_settings: {one_line(error)}") from None
