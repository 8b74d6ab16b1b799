"""`swiftlite megatron rlhf --rlhf_type rm`: a reward model, which scores answers, on megatron-core."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.llm.model.heads import last_token
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.pairs import PairLoader
from swiftlite.megatron.trainers.pooled import PooledBatch, PooledTrainer, pooled
from swiftlite.megatron.trainers.run import run
from swiftlite.train.reward_loss import RewardLoss
from swiftlite.utils.types import Json


class RewardLoader(PairLoader):
    """All chosen answers of a micro batch, then all rejected ones; targets: margins [pairs]."""

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> PooledBatch:  # type: ignore[override]
        pairs = [self.dataset.pair(p) for i in samples if i >= 0 for p in self.dataset.items[i]]
        margins = torch.tensor([float(pair.get("margin", 0.0)) for pair in pairs])
        return pooled(batch, 2 * len(pairs), margins, partial(last_token, pad_token=self.pad_token_id))


class RewardTrainer(PooledTrainer):
    """The loss of pairs' scores; see RewardLoss."""

    loader = RewardLoader
    counted = "pairs"

    def __init__(self, args: MegatronDpoArguments, *rest: Any) -> None:
        super().__init__(args, *rest)
        self.reward = RewardLoss.of(args)
        self.sums = tuple(self.reward.sums(torch.zeros(0), torch.zeros(0)))

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.reward.metrics(sums)

    def judge(self, batch: PooledBatch, outputs: Tensor) -> dict[str, Tensor]:
        chosen, rejected = outputs.squeeze(-1).chunk(2)
        return self.reward.sums(chosen, rejected, batch.targets)

    def minimised(self, sums: dict[str, Tensor]) -> Tensor:
        return self.reward.total({**sums, "pairs": torch.ones(())})

    def count(self, batch: PooledBatch) -> float:
        return len(batch.ends) / 2


def megatron_reward_main(args: MegatronDpoArguments | Sequence[str]) -> Json:
    """Train a reward model on preference pairs, without a reference. Returns, raises: as megatron_dpo_main."""
    return run(as_arguments(MegatronDpoArguments, args), RewardTrainer, load_pairs)
