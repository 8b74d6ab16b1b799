"""What a model in training runs on, and what is changed in its layers for that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.train.sharding import shard
from swiftlite.train.fp16 import GROWTH_INTERVAL, INITIAL_SCALE
from swiftlite.utils.dist import get_world_size
from swiftlite.utils.logger import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = get_logger()


def accelerator_of(args: SftArguments) -> Accelerator:
    """Device, precision and gradients over ranks of a run."""
    AcceleratorState._reset_state(reset_partial_state=True)  # a run before this one in the process had its own
    GradientState._reset_state()
    cpu = not torch.cuda.is_available()
    several = get_world_size() > 1
    dtype = args.model_info.torch_dtype
    # Experts that no token visits: their modules (transformers 4) have no gradients.
    unused = several and args.model_info.is_moe_model and transformers.__version__[0] == "4"
    accelerator = Accelerator(
        mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no"),
        cpu=cpu,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=unused),
            *([InitProcessGroupKwargs(backend="gloo")] if cpu and several else []),
        ],
    )
    if dtype == torch.float16:
        accelerator.native_amp = True  # on a CPU accelerate would compute in fp32, without a scaler
        accelerator.scaler = torch.amp.GradScaler(
            accelerator.device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL
        )
    return accelerator


def place(model: PreTrainedModel, args: SftArguments, accelerator: Accelerator) -> None:
    """Bring a model to this rank's device, or its share of it. Collective."""
    if args.fsdp:
        shard(model, args, accelerator.device)
    elif not accelerator.verify_device_map(model) and not getattr(model, "is_quantized", False):
        model.to(accelerator.device)  # type: ignore[arg-type]  # transformers' wrapper hides the method's own type


def change_layers(model: PreTrainedModel, args: SftArguments) -> None:
    """Recomputation, kernels and noise that were asked for."""
    set_recompute(args, model)
    if args.use_liger_kernel:
        add_liger(model)
    if args.neftune_noise_alpha:
        add_noise(model, args.neftune_noise_alpha)


def set_recompute(args: SftArguments, model: PreTrainedModel) -> None:
    """`full` recomputes whole layers; `selective` attention alone, which all kernels but the plain one do anyway."""
    if args.recompute == "selective" and model.config._attn_implementation == "eager":
        logger.warning("--recompute selective: plain attention (eager) keeps its scores; use --attn_impl sdpa, or full")
    if args.recompute == "full":
        # transformers 5 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def add_liger(model: PreTrainedModel) -> None:
    """liger-kernel's layers in place of transformers'; the loss stays ours."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    base = getattr(model, "get_base_model", lambda: model)()
    _apply_liger_kernel_to_instance(base, cross_entropy=False, fused_linear_cross_entropy=False)


def add_noise(model: PreTrainedModel, alpha: float) -> None:
    """NEFTune (arXiv 2310.05914): while training, embeddings [B, S, H] get uniform noise up to alpha / sqrt(S H)."""

    def noisy(module: torch.nn.Module, _: object, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        limit = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
        return embedded + torch.empty_like(embedded).uniform_(-limit, limit)

    model.get_input_embeddings().register_forward_hook(noisy)
