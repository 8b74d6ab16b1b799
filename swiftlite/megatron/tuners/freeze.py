"""Parameters of a live model that stay as they are, by Hugging Face name (`--train_type freeze`)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.llm.model.tuner import trainable_names
from swiftlite.megatron.shards import LiveMap, iter_shards
from swiftlite.utils.errors import UsageError
from swiftlite.weights.rule import BoundMap, Entry


def plan_freeze(bound: BoundMap, args: MegatronArguments) -> set[str] | None:
    """Hugging Face names of what the `--freeze_parameters*` and `--trainable_parameters*` flags train; None: everything.

    Raises: UsageError as trainable_names.
    """
    sizes = {n: math.prod(e.hf_shapes[i]) for e in _in_order(bound, args) for i, n in enumerate(e.hf)}
    trained = trainable_names(sizes, args)
    return None if len(trained) == len(sizes) else trained


def freeze_parameters(models: Sequence[MegatronModule], bound: BoundMap, args: MegatronArguments) -> set[str] | None:
    """Freeze what `plan_freeze` leaves out, before DDP. Returns: what plan_freeze does.

    Raises: UsageError as plan_freeze; also where weights that Megatron keeps in one matrix are to be parted.
    """
    trained = plan_freeze(bound, args)
    if trained is None:
        return None
    live = LiveMap(bound)
    for model in models:
        held: dict[int, list[str]] = {}
        for shard in iter_shards([model]):
            entry, _ = live.entry(shard)
            held.setdefault(shard.data.untyped_storage().data_ptr(), []).extend(entry.hf)
        for parameter in model.parameters():
            by_fate = sorted(held.get(parameter.untyped_storage().data_ptr(), ()), key=lambda name: name in trained)
            if not by_fate or by_fate[0] in trained:
                continue
            if by_fate[-1] in trained:
                raise UsageError(
                    f"--train_type {args.train_type}: {by_fate[-1]} would be trained and {by_fate[0]} not, but on "
                    "Megatron they are one matrix; freeze or train them together"
                )
            parameter.requires_grad_(False)
        let_gradients_through(model)
    return trained


def _in_order(bound: BoundMap, args: MegatronArguments) -> Iterator[Entry]:
    """Entries of parameters, from the input to the output; no buffers, nothing that is not built."""
    top = [e for e in bound.entries if e.stack is None]
    first = [e for e in top if e.mcore.startswith("embedding.")]
    layers = [e for e in bound.entries if e.stack == "decoder.layers"]
    mtp = [e for e in bound.entries if e.stack not in (None, "decoder.layers") and args.mtp_num_layers]
    for entry in (*first, *layers, *(e for e in top if e not in first), *mtp):
        if not (entry.rule.is_buffer or entry.rule.carried):
            yield entry


def trained_weights(bound: BoundMap, trained: Collection[str], expert_share: float) -> float:
    """Numbers in trained matrices that a token meets; a lookup in an embedding is not a product."""
    total = 0.0
    for name in trained:
        entry, position = bound.by_hf[name]
        if len(entry.hf_shapes[position]) >= 2 and (bound.model.tied or not entry.mcore.startswith("embedding.")):
            total += math.prod(entry.hf_shapes[position]) * (1.0 if entry.expert is None else expert_share)
    return total


def let_gradients_through(model: MegatronModule) -> None:
    """Make the first activations of a model with frozen parts require gradients, where something needs that.

    Recomputation and pipelines ask for a gradient of what goes into a layer or a stage, also if all below is frozen.
    """
    config = model.config
    if not model.pre_process or not (config.recompute_granularity or mpu.get_pipeline_model_parallel_world_size() > 1):
        return

    def require(_: object, __: object, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output

    model.embedding.register_forward_hook(require)
