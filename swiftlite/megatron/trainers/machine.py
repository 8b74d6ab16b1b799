"""What this machine must have for what a run asks of kernels and dtypes."""

from __future__ import annotations

import torch

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.megatron import backend
from swiftlite.megatron.model.config import torch_dtype
from swiftlite.utils.errors import UsageError
from swiftlite.utils.logger import get_logger


def check_machine(args: MegatronSftArguments) -> None:
    """Before anything is read. Raises: UsageError saying what to do instead."""
    with_te = backend.setup().spec == "te"
    if args.optimizer_cpu_offload or args.use_precision_aware_optimizer:
        name = "optimizer_cpu_offload" if args.optimizer_cpu_offload else "use_precision_aware_optimizer"
        if torch_dtype(args) == torch.float32:
            raise UsageError(f"--{name} true: its main weights are fp32, so train in --torch_dtype bfloat16")
    if args.use_precision_aware_optimizer and not args.optimizer_cpu_offload and not with_te:
        raise UsageError(
            "--use_precision_aware_optimizer true: needs a GPU and Transformer Engine, whose Adam keeps such states; "
            "leave it out, or keep them in host memory with --optimizer_cpu_offload true"
        )
    if args.offload_modules and not with_te:
        raise UsageError("--offload_modules: needs a GPU and Transformer Engine; recompute instead (--recompute full)")
    experts = {"moe_act", "expert_fc1"}.intersection(args.offload_modules)
    if "moe_act" in args.recompute_modules and args.recompute_granularity == "selective" and not with_te:
        raise UsageError("--recompute_modules moe_act: needs Transformer Engine's grouped experts; take moe")
    model = args.description
    norms_are_modules = model.multi_latent_attention or any(model.moe_layer_pattern) or not with_te
    if args.recompute_granularity == "selective" and "layernorm" in args.recompute_modules and not norms_are_modules:
        get_logger().info(
            "--recompute_modules layernorm saves nothing here: Transformer Engine computes these norms with the projections "
            "behind them; with mlp that of the MLP is recomputed"
        )
    if experts and args.moe_grouped_impl == "torch":
        raise UsageError(f"--offload_modules {' '.join(experts)}: needs --moe_grouped_impl te")
    if args.fp8_format is not None:
        newest = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(args.fp8_recipe, (8, 9))
        if not with_te or torch.cuda.get_device_capability() < newest:
            raise UsageError(
                f"--fp8_format {args.fp8_format}: needs Transformer Engine and a GPU of compute capability "
                f"{newest[0]}.{newest[1]} (8.9: Ada, 9.0: Hopper, 10.0: Blackwell); leave it out to train in bf16"
            )
        if torch_dtype(args) == torch.float32:
            raise UsageError(f"--fp8_format {args.fp8_format}: beside it all else is bf16; add --torch_dtype bfloat16")
