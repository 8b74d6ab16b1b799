"""Losses on preference pairs, from summed log-probabilities; shared by both sides. Imports torch only.

Letters: P pairs, B sequences (2P: all chosen ones, then all rejected ones), S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

IGNORE_INDEX = -100
# Names of what `PairLoss.sums` gives.
SUMS = (
    "loss", "pairs", "nll", "chosen_tokens", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class PairLoss:
    """The loss of a pair by `loss_type`, from its scores: log(policy / reference) of the two answers.

    Without a reference (cpo, simpo, orpo) the scores are the policy's log-probabilities; ipo, simpo and orpo take them per
    token. beta: strength of the pull to the reference, factor on the scores (ipo: the temperature tau; orpo: weight of the
    odds ratio). label_smoothing: probability that a label is wrong. rpo_alpha: weight of the chosen answers' cross entropy,
    see `total`. gamma: margin that simpo asks for. mixture: several losses with their weights, in place of `loss_type`.
    Sources: DPO 2305.18290, IPO 2310.12036, SLiC 2305.10425, robust 2403.00409, SPPO 2405.00675, APO 2408.06266,
    CPO 2401.08417, SimPO 2405.14734, ORPO 2403.07691, BCO 2404.04656, mixtures (MPO) 2411.10442 (arXiv).
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None
    gamma: float = 0.0
    mixture: Mapping[str, float] = field(default_factory=dict)

    @property
    def per_token(self) -> bool:
        return self.loss_type in ("ipo", "simpo", "orpo")

    def __call__(self, policy: LogProbs, reference: LogProbs | None) -> Tensor:
        """Losses [P], with gradients into `policy`; the chosen answers' cross entropy is not in them."""
        chosen, rejected = policy.scores(reference, self.per_token)
        parts = self.mixture or {self.loss_type: 1.0}
        return torch.stack([w * PAIR_LOSSES[name](self, chosen, rejected) for name, w in parts.items()]).sum(0)

    def total(self, loss_sum: Tensor, pairs: Tensor, nll_sum: Tensor, chosen_tokens: Tensor) -> Tensor:
        """Mean pair loss + rpo_alpha x mean cross entropy over the chosen answers' tokens, of a whole global batch.

        Sums may be one micro batch's while the counts are the global batch's: the results then add up.
        """
        loss = loss_sum / pairs
        if self.rpo_alpha:
            loss = loss + self.rpo_alpha * nll_sum / chosen_tokens.clamp(min=1)
        return loss

    def sums(self, policy: LogProbs, reference: LogProbs | None) -> dict[str, Tensor]:
        """What `total` and `metrics` take: scalars to add up over batches and ranks; `loss` and `nll` have gradients."""
        losses = self(policy, reference)
        per_token = self.per_token and reference is None
        chosen, rejected = (self.beta * score.detach() for score in policy.scores(reference, per_token))
        policy_chosen, policy_rejected = policy.sums.chunk(2)
        return {
            "loss": losses.sum(),
            "pairs": losses.new_full((), float(len(losses))),
            "nll": -policy_chosen.sum(),
            "chosen_tokens": policy.tokens.chunk(2)[0].sum(),
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).float().sum(),
            "logps/chosen": policy_chosen.detach().sum(),
            "logps/rejected": policy_rejected.detach().sum(),
        }

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches: means over pairs, `nll_loss` over tokens."""
        pairs = max(sums["pairs"], 1.0)
        parts = (sums["loss"], pairs, sums["nll"], sums["chosen_tokens"])
        values = {"loss": float(self.total(*(torch.tensor(part, dtype=torch.float64) for part in parts)))}
        values.update({name: sums[name] / pairs for name in SUMS if name.startswith(("rewards/", "logps/"))})
        if self.rpo_alpha:
            values["nll_loss"] = sums["nll"] / max(sums["chosen_tokens"], 1.0)
        return values


@dataclass(frozen=True)
class LogProbs:
    """sums: [B] log-probability of each answer, fp32. tokens: [B] tokens in it, fp32."""

    sums: Tensor
    tokens: Tensor

    def scores(self, reference: LogProbs | None, per_token: bool) -> tuple[Tensor, Tensor]:
        """log(policy / reference), or the policy's own, of the chosen and of the rejected answers, [P] each.

        per_token: as means, so that they do not depend on the answers' lengths.
        """
        values = self.sums if reference is None else self.sums - reference.sums
        chosen, rejected = (values / self.tokens.clamp(min=1) if per_token else values).chunk(2)
        return chosen, rejected


def _smoothed(loss: PairLoss, margin: Tensor) -> Tensor:
    wrong = loss.label_smoothing
    return -logsigmoid(margin) * (1 - wrong) - logsigmoid(-margin) * wrong


def _robust(loss: PairLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Unbiased where labels are wrong with probability `label_smoothing`."""
    margin, wrong = loss.beta * (chosen - rejected), loss.label_smoothing
    return (-logsigmoid(margin) * (1 - wrong) + logsigmoid(-margin) * wrong) / (1 - 2 * wrong)


def _odds_ratio(loss: PairLoss, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Of p / (1 - p), p the probability of an answer's average token."""
    others = [
        torch.log((-torch.expm1(x)).clamp(min=torch.finfo(x.dtype).tiny)) for x in (chosen, rejected)
    ]  # log(1 - p)
    return -loss.beta * logsigmoid(chosen - rejected - (others[0] - others[1]))


# Losses [P] of scores c and r, [P] each.
PAIR_LOSSES: Mapping[str, Callable[[PairLoss, Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda loss, c, r: _smoothed(loss, loss.beta * (c - r)),
    "ipo": lambda loss, c, r: (c - r - 1 / (2 * loss.beta)) ** 2,
    "hinge": lambda loss, c, r: torch.relu(1 - loss.beta * (c - r)),
    "robust": _robust,
    "sppo_hard": lambda loss, c, r: (c - 0.5 / loss.beta) ** 2 + (r + 0.5 / loss.beta) ** 2,
    "apo_zero": lambda loss, c, r: 1 - torch.sigmoid(loss.beta * c) + torch.sigmoid(loss.beta * r),
    "apo_down": lambda loss, c, r: torch.sigmoid(loss.beta * c) + 1 - torch.sigmoid(loss.beta * (c - r)),
    "bco_pair": lambda loss, c, r: -logsigmoid(loss.beta * c) - logsigmoid(-loss.beta * r),
    "cpo": lambda loss, c, r: _smoothed(loss, loss.beta * (c - r)),
    "simpo": lambda loss, c, r: _smoothed(loss, loss.beta * (c - r) - loss.gamma),
    "orpo": _odds_ratio,
}


def sum_log_probs(token_losses: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> LogProbs:
    """Sum per answer.

    Args: token_losses: cross entropy of each position, any shape. mask: same shape, 1 where an answer's token is
        predicted. sequence_ids: int64, same shape: which of the `num_sequences` a position belongs to.
    """
    mask = mask.float().flatten()
    ids = sequence_ids.flatten()
    # Summed in fp64: a GPU adds in any order, and what that changes in fp32 is as large as the margins of first steps.
    zeros = torch.zeros(num_sequences, device=token_losses.device, dtype=torch.float64)
    values = token_losses.double().flatten() * mask
    return LogProbs(zeros.index_add(0, ids, -values).float(), zeros.float().index_add(0, ids, mask))


def answer_log_probs(logits: Tensor, labels: Tensor, sequence_ids: Tensor | None = None, num: int = 0) -> LogProbs:
    """Log-probabilities of answers from logits [B, S, V] and labels [B, S] (not shifted, -100 outside the answers), or
    [B, S + 1] where the sequence goes on.

    sequence_ids [B, S] with `num` sequences where several share a row; else each row is one.
    """
    targets = labels[:, 1:]
    predicted = logits[:, : targets.shape[1]].float().transpose(1, 2)
    losses = cross_entropy(predicted, targets, ignore_index=IGNORE_INDEX, reduction="none")
    if sequence_ids is None:
        num = len(labels)
        sequence_ids = torch.arange(num, device=labels.device)[:, None].expand_as(labels)
    return sum_log_probs(losses, targets != IGNORE_INDEX, sequence_ids[:, 1:], num)
