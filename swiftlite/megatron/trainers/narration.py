"""What a run says before its first step and after its last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swiftlite.megatron import backend
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.model.config import torch_dtype
from swiftlite.megatron.model.experts import implementation
from swiftlite.train.ending import say_ended
from swiftlite.utils.logger import get_logger, log_next

if TYPE_CHECKING:
    from swiftlite.megatron.trainers.base import Trainer

logger = get_logger()

HF_SUFFIX = "-hf"


def say_start(trainer: Trainer) -> None:
    """Say what runs, before it runs."""
    parameters = [p for model in trainer.models for p in model.parameters()]
    trained, total = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (False, True))
    logger.info("%s", backend.setup().describe())
    logger.info(
        "%s; dtype %s; %s of %s parameters on this rank are trained; MoE dispatcher %s",
        trainer.parallel.describe(), str(torch_dtype(trainer.args)).removeprefix("torch."), f"{trained:,}", f"{total:,}",
        trainer.config.moe_token_dispatcher_type if trainer.config.num_moe_experts else "none",
    )  # fmt: skip
    _say_kernels(trainer)
    logger.info(
        "%d steps of %d samples (micro batch %d x %d accumulated x %d data-parallel ranks), %s training and %d "
        "validation samples", trainer.train_iters, trainer.global_batch_size, trainer.plan.micro_batch_size,
        trainer.plan.num_microbatches, trainer.parallel.dp_size, trainer.order.num_samples or "streamed", trainer.val_size,
    )  # fmt: skip


def _say_kernels(trainer: Trainer) -> None:
    """The choices that only cost or save time."""
    config, graphs = trainer.config, trainer.graphs
    loss = f"fused ({config.cross_entropy_fusion_impl})" if config.cross_entropy_loss_fusion else "plain"
    experts = f"; experts {implementation(trainer.args, config)}" if config.num_moe_experts else ""
    passes = "eager" if graphs is None or graphs.obstacle else "a CUDA graph from the third step of one shape on"
    why = f" ({graphs.obstacle})" if graphs is not None and graphs.obstacle else ""
    logger.info("cross entropy %s%s; passes %s%s", loss, experts, passes, why)


def say_end(trainer: Trainer, seconds: float, last: dict[str, float]) -> None:
    """Say what the run has come to and what can be done with it. last: values of its last log line, if it made a step."""
    say_ended(
        trainer.position.iteration, last.get("loss"), seconds, backend.peak_memory_bytes(),
        trainer.written if last else (), trainer.best, trainer.stopped,
    )  # fmt: skip
    if not last:
        return
    hf_dirs = [p for p in trainer.written if p.name.endswith(HF_SUFFIX)]
    if hf_dirs:
        log_next("swiftlite", "infer", "--model", hf_dirs[-1], *trainer.args.loading_words(hub=False))
    elif trainer.lora:
        adapters = trainer.root / checkpoint.iteration_name(trainer.position.iteration)
        if trainer.args.mcore_model:
            base = ("--mcore_model", trainer.args.mcore_model)
            log_next("swiftlite", "export", *base, "--adapters", adapters, "--merge_lora", "true")
        else:
            known = ["--model", trainer.args.model] if trainer.args.model else []  # an adapter knows its base
            log_next("swiftlite", "infer", *known, "--adapters", adapters, *trainer.args.loading_words())
    else:
        log_next("swiftlite", "export", "--mcore_model", trainer.root, "--to_hf", "true")
