"""The loss of reward models, from the scores of pairs; shared by both sides. P: pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from swiftlite.arguments.preference import PreferenceArguments

# Names of means over pairs in a log line.
MEANS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@dataclass(frozen=True)
class RewardLoss:
    """-log sigmoid(chosen - rejected - margin), and `centre` times (chosen + rejected)^2: means over pairs.

    centre: pulls scores to 0, which the difference alone leaves open (arXiv 2312.09244). margin: how much better the chosen
    answer is, where data says it (arXiv 2307.09288). Source: Bradley-Terry, as in trl's RewardTrainer.
    """

    centre: float = 0.0

    @classmethod
    def of(cls, args: PreferenceArguments) -> RewardLoss:
        return cls(args.center_rewards_coefficient or 0.0)

    def sums(self, chosen: Tensor, rejected: Tensor, margins: Tensor | None = None) -> dict[str, Tensor]:
        """Of scores [P]: scalars to add up over batches and ranks; `loss` and `centre` have gradients."""
        chosen, rejected = chosen.float(), rejected.float()
        better = chosen - rejected
        losses = -logsigmoid(better if margins is None else better - margins)
        seen = {"chosen": chosen, "rejected": rejected, "margins": better, "accuracies": (better > 0).float()}
        return {
            "loss": losses.sum(),
            "centre": ((chosen + rejected) ** 2).sum(),
            "pairs": losses.new_full((), float(len(losses))),
            **{f"rewards/{name}": values.detach().sum() for name, values in seen.items()},
        }

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """The mean, of sums whose `pairs` may be the global batch's: its micro batches' results then add up."""
        return (sums["loss"] + self.centre * sums["centre"]) / torch.as_tensor(sums["pairs"]).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches."""
        pairs = max(sums["pairs"], 1.0)
        loss = (sums["loss"] + self.centre * sums["centre"]) / pairs
        return {"loss": loss, **{name: sums[name] / pairs for name in MEANS}}
