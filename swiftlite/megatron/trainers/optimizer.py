"""Optimizer, learning rates and loss scale of a run on megatron-core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend
from swiftlite.megatron.model.config import torch_dtype
from swiftlite.train.fp16 import GROWTH_INTERVAL, HEADROOM, INITIAL_SCALE, LOWEST_SCALE
from swiftlite.train.schedule import warmup_and_decay, wsd_steps

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}


def build_optimizer(models: Sequence[torch.nn.Module], args: MegatronArguments) -> MegatronOptimizer:
    """Adam with fp32 main parameters, always as the distributed optimizer: so one checkpoint format exists."""
    dtype = torch_dtype(args)
    config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=INITIAL_SCALE,
        min_loss_scale=LOWEST_SCALE,
        loss_scale_window=GROWTH_INTERVAL,
        hysteresis=1,
        use_distributed_optimizer=True,
        optimizer_cpu_offload=args.optimizer_cpu_offload,
        optimizer_offload_fraction=args.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=args.overlap_cpu_optimizer_d2h_h2d,
        pin_cpu_grads=backend.setup().is_cuda,
        # The optimizer that keeps states on the host keeps main weights itself, too: so no others stay on the GPU.
        use_precision_aware_optimizer=args.use_precision_aware_optimizer or args.optimizer_cpu_offload,
        # True would keep what fp32 weights have beyond bf16, and save only that: no other run could read it.
        store_param_remainders=False,
        main_grads_dtype=_DTYPES[args.main_grads_dtype],
        main_params_dtype=_DTYPES[args.main_params_dtype],
        exp_avg_dtype=_DTYPES[args.exp_avg_dtype],
        exp_avg_sq_dtype=_DTYPES[args.exp_avg_sq_dtype],
        overlap_param_gather=bool(args.overlap_param_gather),
    )
    return get_megatron_optimizer(config, list(models))


def build_scheduler(
    optimizer: MegatronOptimizer, args: MegatronArguments, train_iters: int, global_batch_size: int
) -> OptimizerParamScheduler:
    """Warm-up, then decay to min_lr; counted in samples, as megatron-core does. Raises: as warmup_and_decay."""
    warmup, decay = warmup_and_decay(args, train_iters)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup * global_batch_size,
        lr_decay_steps=decay * global_batch_size,
        lr_decay_style=args.lr_decay_style,
        wsd_decay_steps=wsd_steps(args, decay) * global_batch_size,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=train_iters * global_batch_size,
        wd_incr_style="constant",
        # A resumed run's arguments equal those of the first (run_directory), so they rule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def agree_on_loss_scale(optimizer: MegatronOptimizer) -> None:
    """Let the optimizers of a chain (experts have their own) continue with one loss scale, the lowest.

    An overflow in one of them lowers only its scale, while the loss is multiplied by that of the first.
    """
    scalers = [part.grad_scaler for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    if len(scalers) > 1 and all(scalers):
        lowest = min(scalers, key=lambda scaler: float(scaler.scale))
        for scaler in scalers:
            scaler.load_state_dict(lowest.state_dict())


def can_go_down(scale: float) -> bool:
    """Whether there is a lower loss scale to try."""
    return scale > LOWEST_SCALE


def leave_headroom(optimizer: MegatronOptimizer) -> None:
    """Lower a loss scale that the first batch just allows: the gradients of the next ones may be larger."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        scale = (part.grad_scaler.scale / HEADROOM).clamp(min=LOWEST_SCALE)
        part.grad_scaler.load_state_dict({**part.grad_scaler.state_dict(), "scale": scale})
