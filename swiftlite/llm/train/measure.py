"""What an objective adds up to over samples that nothing is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.llm.train.sharding import release
from swiftlite.train.batches import BatchPlan, evaluation_samples
from swiftlite.train.order import Samples
from swiftlite.utils.dist import get_world_size

if TYPE_CHECKING:
    from swiftlite.llm.train.trainer import HfTrainer


@torch.no_grad()
def sums_of(engine: HfTrainer, val_set: Samples, plan: BatchPlan) -> dict[str, float]:
    """The objective's sums over a validation set, or --eval_iters global batches of it; the last, smaller batch counts too.

    Collective. The engine's model is at its place.
    """
    total: dict[str, Tensor] = {}
    engine.model.eval()
    for samples in evaluation_samples(len(val_set), plan.global_batch_size, engine.args.eval_iters):
        # A rank without samples of its own runs one that counts nothing, so that all know the names.
        passes = [[i for i in passed if i >= 0] for passed in plan.micro_batches(samples)]
        batches = [(engine.collate([val_set[i] for i in there or [0]]), bool(there)) for there in passes]
        engine.prepare(batches)
        for batch, counts in batches:
            gathers = getattr(engine.objective, "gathers", False)
            # Ranks run a sharded model together, and look at each other's texts.
            if not counts and total and not (engine.args.fsdp or gathers):
                continue
            if gathers and not counts:
                batch["absent"] = torch.ones(())
            with engine.accelerator.autocast():
                sums = engine.objective.sums(engine.model, engine.inputs(batch))
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + value.double() * counts
    added = torch.stack(list(total.values()))
    if get_world_size() > 1:
        torch.distributed.all_reduce(added)
    engine.model.train()
    release(engine.model)
    return dict(zip(total, added.tolist(), strict=True))
