"""Losses on answers that are each desirable or not, from summed log-probabilities; shared by both sides. Imports torch only.

B: answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swiftlite.train.dpo_loss import LogProbs

# Names of what `KtoLoss.sums` gives.
SUMS = (
    "loss", "answers", "desirable", "undesirable", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class KtoLoss:
    """The loss of an answer by `loss_type`, from its score: log(policy / reference).

    kto compares scores with how far the policy is from the reference altogether: `kl`, the mean score of answers to other
    prompts than theirs. beta: strength of the pull to the reference, factor on the scores. The weights are those of the two
    kinds of answers.
    Sources: KTO 2402.01306, equations 7 and 8; APO 2408.06266 (arXiv); trl's KTOTrainer.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def compares(self) -> bool:
        """Does the loss ask for `kl`?"""
        return self.loss_type == "kto"

    def kl(self, score_sum: Tensor, answers: Tensor) -> Tensor:
        """From the sum of the mismatched answers' scores over a whole global batch; not below 0."""
        return (score_sum / answers.clamp(min=1)).clamp(min=0)

    def __call__(self, policy: LogProbs, reference: LogProbs, desirable: Tensor, kl: Tensor) -> Tensor:
        """Losses [B], with gradients into `policy`. desirable: bool [B]. kl: scalar."""
        scores = policy.sums - reference.sums
        distance = self.beta * (scores - kl if self.compares else scores)
        good = self.desirable_weight * (1 - torch.sigmoid(distance))
        bad = self.undesirable_weight * (1 - torch.sigmoid(-distance))
        return torch.where(desirable, good, bad)

    def sums(self, policy: LogProbs, reference: LogProbs, desirable: Tensor, kl: Tensor) -> dict[str, Tensor]:
        """What `metrics` takes: scalars to add up over batches and ranks; `loss` has gradients."""
        losses = self(policy, reference, desirable, kl)
        rewards = self.beta * (policy.sums - reference.sums).detach()
        log_probs, good = policy.sums.detach(), desirable.float()
        return {
            "loss": losses.sum(),
            "answers": losses.new_full((), float(len(losses))),
            "desirable": good.sum(),
            "undesirable": (1 - good).sum(),
            "kl": kl * len(losses),
            "rewards/chosen": (rewards * good).sum(),
            "rewards/rejected": (rewards * (1 - good)).sum(),
            "logps/chosen": (log_probs * good).sum(),
            "logps/rejected": (log_probs * (1 - good)).sum(),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches: means over all answers, or those of one kind.

        Of a kind that is not there nothing is said.
        """
        answers = max(sums["answers"], 1.0)
        values = {"loss": sums["loss"] / answers}
        if self.compares:
            values["kl"] = sums["kl"] / answers
        for kind, count in (("chosen", sums["desirable"]), ("rejected", sums["undesirable"])):
            if count:
                values.update({f"{name}/{kind}": sums[f"{name}/{kind}"] / count for name in ("rewards", "logps")})
        if sums["desirable"] and sums["undesirable"]:
            values["rewards/margins"] = values["rewards/chosen"] - values["rewards/rejected"]
        return values
