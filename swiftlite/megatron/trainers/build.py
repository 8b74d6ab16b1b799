"""What a run on megatron-core consists of, from its arguments: models, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.head import head_of, with_head
from swiftlite.megatron.distributed import ParallelState
from swiftlite.megatron.hf_io import load_weights
from swiftlite.megatron.model.blocks.router import set_router_losses
from swiftlite.megatron.model.config import virtual_stages
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.trainers.optimizer import build_optimizer, build_scheduler
from swiftlite.megatron.trainers.wrapping import add_noise, choose_overlap, wrap_models
from swiftlite.megatron.tuners.freeze import freeze_parameters, trained_weights
from swiftlite.megatron.tuners.lora import load_given, prepare_lora
from swiftlite.megatron.tuners.lora_plan import LoraPlan
from swiftlite.train.flops import ModelFlops
from swiftlite.utils.errors import UsageError


@dataclass
class Built:
    """origin: of the weights. lora: of a run that trains adapters. trained: Hugging Face names, of a run that leaves some
    parameters as they are. router_losses: whether routers add something to the loss.
    """

    origin: Checkpoint
    models: list[MegatronModule]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    lora: LoraPlan | None
    trained: set[str] | None
    router_losses: bool

    def load_origin(self, allow_overflow: bool) -> None:
        """Load the weights that the run begins with. Collective."""
        load_weights(self.models, self.origin, allow_overflow)
        if self.lora:
            load_given(self.models, self.lora)
        self.optimizer.reload_model_params()

    def trained_weights(self, flops: ModelFlops) -> dict[str, float | None]:
        """`trained` and `adapters` of ModelFlops.training."""
        bound, share = self.origin.bound, flops.expert_share
        if self.lora:
            trained = trained_weights(bound, self.lora.whole, share)
            return {"trained": trained, "adapters": self.lora.met_weights(bound, share)}
        return {"trained": trained_weights(bound, self.trained, share) if self.trained else None}


def variable_lengths(args: MegatronSftArguments, parallel: ParallelState) -> bool:
    """Stages tell each other the shapes of what they send, but not in an interleaved pipeline: one length there."""
    return parallel.pp_size > 1 and virtual_stages(args) is None


def build(
    args: MegatronSftArguments, parallel: ParallelState, origin_dir: Path, pad_token_id: int, steps: int, passes: int,
    global_batch: int,
) -> Built:  # fmt: skip
    """Models without the origin's weights, their optimizer and its schedule. Collective.

    Args: pad_token_id: config.json of a classifier has to tell it. passes: micro batches of a step on each rank.
    Raises: UsageError for settings that do not fit together.
    """
    stages = virtual_stages(args)
    if stages and passes % parallel.pp_size:
        raise UsageError(
            f"{passes} micro batches a step: with --num_virtual_stages_per_pipeline_rank {stages} they must be a "
            f"multiple of --pipeline_model_parallel_size {parallel.pp_size}"
        )
    choose_overlap(args, parallel)
    origin = Checkpoint.open(origin_dir, new_tokens=args.new_tokens)
    origin = with_head(origin, head_of(args, origin.config, pad_token_id))
    models = build_models(args, variable_seq_lengths=variable_lengths(args, parallel))
    lora = trained = None
    if args.train_type == "lora":
        lora = prepare_lora(models, origin, args)
    else:
        trained = freeze_parameters(models, origin.bound, args)
    if args.skip_train:  # no buffers of gradients, no states
        for model in models:
            model.requires_grad_(False)
    add_noise(models, args.neftune_noise_alpha or 0.0)
    router_losses = set_router_losses(models, args)
    wrapped = wrap_models(models, args)
    optimizer = build_optimizer(wrapped, args)
    scheduler = build_scheduler(optimizer, args, steps, global_batch)
    return Built(origin, wrapped, optimizer, scheduler, lora, trained, router_losses)
