"""Losses of rerankers, from a score for each pair of query and document; shared by both sides. Imports torch only.

Letters: B pairs, R groups: the pairs of one query, one of them with a document that answers it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


@dataclass(frozen=True)
class RankingLoss:
    """pointwise_reranker: binary cross entropy of each pair, a mean over pairs. listwise_reranker: cross entropy of choosing
    the answering document of a group by score / temperature, a mean over groups.
    """

    loss_type: str = "pointwise_reranker"
    temperature: float = 1.0

    @property
    def counted(self) -> str:
        """Of `sums`, what `loss` is divided by."""
        return "groups" if self.loss_type == "listwise_reranker" else "pairs"

    def count(self, groups: Tensor) -> int:
        """How many of them a micro batch has, by its samples' `groups`."""
        if self.counted == "pairs":
            return len(groups)
        return int(groups[-1]) + 1 if len(groups) else 0

    def __call__(self, scores: Tensor, groups: Tensor, relevant: Tensor) -> Tensor:
        """Losses [B] or [R] of scores [B]. groups: int64 [B], from 0 on, in order. relevant: float [B], 1 where the document
        answers, 0 where not; or how likely it does, for pointwise."""
        scores = scores.float()
        if self.loss_type == "pointwise_reranker":
            return binary_cross_entropy_with_logits(scores, relevant.to(scores), reduction="none")
        listed, answers = _by_group(scores / self.temperature, groups), _by_group(relevant.to(scores), groups)
        return torch.logsumexp(listed, 1) - torch.where(answers > 0.5, listed, 0.0).sum(1)

    def sums(self, scores: Tensor, groups: Tensor, relevant: Tensor) -> dict[str, Tensor]:
        """What `total` and `metrics` take: scalars to add up over batches and ranks; `loss` has gradients."""
        if not len(groups):
            names = ("loss", "pairs", "groups", "correct", "compared", "first", "reciprocal", "margin")
            return {name: scores.float().sum() for name in names}  # 0
        losses = self(scores, groups, relevant)
        seen = scores.detach().float()
        listed, answers = _by_group(seen, groups), _by_group(relevant.to(seen), groups)
        others = torch.where(answers > 0.5, float("-inf"), listed)
        best = torch.where(answers > 0.5, listed, float("-inf")).amax(1)
        compared = (best > float("-inf")) & (others.amax(1) > float("-inf"))
        rank = 1 + (others >= best[:, None]).sum(1)  # equal scores count against it
        return {
            "loss": losses.sum(),
            "pairs": seen.new_full((), float(len(seen))),
            "groups": seen.new_full((), float(len(listed))),
            "correct": ((seen > 0) == (relevant > 0.5)).float().sum(),
            "compared": compared.float().sum(),
            "first": (compared & (rank == 1)).float().sum(),
            "reciprocal": torch.where(compared, 1.0 / rank, 0.0).sum(),
            "margin": torch.where(compared, best - others.amax(1), 0.0).sum(),
        }

    def total(self, loss_sum: Tensor, count: Tensor) -> Tensor:
        """The mean, of sums that may be one micro batch's while `count` (see `counted`) is the global batch's."""
        return loss_sum / torch.as_tensor(count).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches.

        `accuracy`: pairs whose score is on the right side of 0. Of groups with other documents: `top1`, share in which the
        answering one has the highest score; `mrr`, mean of 1 / its rank; `margin`, its score less the next one's.
        """
        compared = max(sums["compared"], 1.0)
        return {
            "loss": sums["loss"] / max(sums[self.counted], 1.0),
            "accuracy": sums["correct"] / max(sums["pairs"], 1.0),
            "top1": sums["first"] / compared,
            "mrr": sums["reciprocal"] / compared,
            "margin": sums["margin"] / compared,
        }


def _by_group(values: Tensor, groups: Tensor) -> Tensor:
    """[R, B]: of each group its own values, minus infinity elsewhere."""
    own = groups == torch.arange(int(groups[-1]) + 1, device=groups.device)[:, None]
    return torch.where(own, values, float("-inf"))
