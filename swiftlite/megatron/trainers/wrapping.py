"""Models made ready for training: on their device, in their precision, in DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import Float16Module, MegatronModule
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend
from swiftlite.megatron.distributed import ParallelState
from swiftlite.megatron.model.layers import accumulate_in_place


def choose_overlap(args: MegatronArguments, parallel: ParallelState) -> None:
    """Collectives of data parallelism run during the passes by default where they have streams of their own.

    Adapters are gathered at once: they are small, and those of grouped experts are read outside their own modules,
    whose calls would wait for them.
    """
    beside = backend.setup().is_cuda and parallel.dp_size > 1 and parallel.pp_size == 1
    if args.overlap_grad_reduce is None:
        args.overlap_grad_reduce = beside
    if args.overlap_param_gather is None:
        args.overlap_param_gather = beside and args.overlap_grad_reduce and args.train_type != "lora"


def add_noise(models: Sequence[MegatronModule], alpha: float) -> None:
    """NEFTune, as llm.train.device.add_noise. Embeddings are [S, B, H], S a part of the text where ranks share it."""

    def noisy(module: MegatronModule, _: object, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        apart = module.config.sequence_parallel and mpu.get_tensor_model_parallel_world_size() > 1
        parts = mpu.get_context_parallel_world_size() * (mpu.get_tensor_model_parallel_world_size() if apart else 1)
        limit = alpha / math.sqrt(parts * embedded.shape[0] * embedded.shape[2])
        with get_cuda_rng_tracker().fork() if apart else nullcontext():  # else ranks hold the same tokens
            return embedded + torch.empty_like(embedded).uniform_(-limit, limit)

    for model in models if alpha else ():
        if model.pre_process:
            model.embedding.register_forward_hook(noisy)


def in_precision(model: MegatronModule) -> MegatronModule:
    """Move to the device, wrap in Float16Module for half precision. Router biases stay fp32: it would round them."""
    config = model.config
    model.to(backend.setup().device)
    if config.bf16 or config.fp16:
        kept = {m: m.expert_bias.float() for m in model.modules() if getattr(m, "expert_bias", None) is not None}
        model = Float16Module(config, model)
        for module, bias in kept.items():
            module.expert_bias = bias
    return model


class OwnGradients(DistributedDataParallel):  # type: ignore[misc]
    """DDP of models whose optimizer reads a rank's own part of the reduced gradients only."""

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Of that part: what lies around it has not been summed up and is read by nobody."""
        for group in (*self.bucket_groups, *self.expert_parallel_bucket_groups):
            size, rank = (
                group.intra_distributed_optimizer_instance_size,
                group.intra_distributed_optimizer_instance_rank,
            )
            for bucket in group.buckets:
                bucket.grad_data.view(size, -1)[rank].mul_(scaling_factor)


def wrap_models(models: Sequence[MegatronModule], args: MegatronArguments) -> list[MegatronModule]:
    """Models in their precision, in DDP with one buffer layout for every DP size."""
    wrapped = []
    for index, model in enumerate(models):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=args.main_grads_dtype == "fp32",
            overlap_grad_reduce=bool(args.overlap_grad_reduce),
            overlap_param_gather=bool(args.overlap_param_gather),
            use_distributed_optimizer=True,
        )
        ddp = OwnGradients(model.config, ddp_config, in_precision(model), disable_bucketing=index > 0)
        if args.gradient_accumulation_fusion:
            accumulate_in_place(ddp)
        wrapped.append(ddp)
    return wrapped
