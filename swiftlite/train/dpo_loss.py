"""Losses on preference pairs, from summed log-probabilities; shared by both sides. Imports torch only.

Letters: P pairs, B sequences (2P: all chosen ones, then all rejected ones), S tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

IGNORE_INDEX = -100
LOSS_TYPES = ("sigmoid", "ipo", "hinge")
# Names of what `PairLoss.sums` gives.
SUMS = (
    "loss", "pairs", "nll", "chosen_tokens", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class PairLoss:
    """The loss of a pair: `loss_type` of the margin by which the policy prefers the chosen answer more than the reference.

    beta: strength of the pull to the reference (ipo: the temperature tau). label_smoothing: probability that a label is
    wrong (sigmoid only). rpo_alpha: weight of the chosen answers' cross entropy, see `total`.
    """

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    rpo_alpha: float | None = None

    def __call__(self, policy: LogProbs, reference: LogProbs) -> Tensor:
        """Losses [P], with gradients into `policy`; the chosen answers' cross entropy is not in them."""
        chosen, rejected = policy.ratios(reference)
        if self.loss_type == "ipo":
            # Per token: a sum would make the target margin depend on the answers' lengths.
            tokens_chosen, tokens_rejected = policy.tokens.clamp(min=1).chunk(2)
            return (chosen / tokens_chosen - rejected / tokens_rejected - 1 / (2 * self.beta)) ** 2
        margin = self.beta * (chosen - rejected)
        if self.loss_type == "hinge":
            return torch.relu(1 - margin)
        return -logsigmoid(margin) * (1 - self.label_smoothing) - logsigmoid(-margin) * self.label_smoothing

    def total(self, loss_sum: Tensor, pairs: Tensor, nll_sum: Tensor, chosen_tokens: Tensor) -> Tensor:
        """Mean pair loss + rpo_alpha x mean cross entropy over the chosen answers' tokens, of a whole global batch.

        Sums may be one micro batch's while the counts are the global batch's: the results then add up.
        """
        loss = loss_sum / pairs
        if self.rpo_alpha:
            loss = loss + self.rpo_alpha * nll_sum / chosen_tokens.clamp(min=1)
        return loss

    def sums(self, policy: LogProbs, reference: LogProbs) -> dict[str, Tensor]:
        """What `total` and `metrics` take: scalars to add up over batches and ranks; `loss` and `nll` have gradients."""
        losses = self(policy, reference)
        chosen, rejected = (self.beta * ratio.detach() for ratio in policy.ratios(reference))
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

    def ratios(self, reference: LogProbs) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of the chosen and of the rejected answers, [P] each."""
        chosen, rejected = (self.sums - reference.sums).chunk(2)
        return chosen, rejected


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
    """Log-probabilities of answers from logits [B, S, V] and labels [B, S] (not shifted, -100 outside the answers).

    sequence_ids [B, S] with `num` sequences where several share a row; else each row is one.
    """
    targets = labels[:, 1:]
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none")
    if sequence_ids is None:
        num = len(labels)
        sequence_ids = torch.arange(num, device=labels.device)[:, None].expand_as(labels)
    return sum_log_probs(losses, targets != IGNORE_INDEX, sequence_ids[:, 1:], num)
