"""Losses of models that classify or predict numbers, from logits and labels; shared by both sides. Imports torch only.

Letters: B samples, N classes or numbers. Labels: int64 [B] of one class each, else float32 [B, N]: 0 and 1 of any number of
classes, or the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss


@dataclass(frozen=True)
class ClassificationLoss:
    """Cross entropy, binary cross entropy or squared error by `problem_type`: a mean over samples (and classes, numbers).

    Source: transformers, loss/loss_utils.py, ForSequenceClassificationLoss.
    """

    problem_type: str
    num_labels: int

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses [B] of logits [B, N]."""
        logits = logits.float()
        if self.problem_type == "single_label_classification":
            return cross_entropy(logits, labels, reduction="none")
        each = mse_loss if self.problem_type == "regression" else binary_cross_entropy_with_logits
        return each(logits, labels, reduction="none").mean(-1)

    def sums(self, logits: Tensor, labels: Tensor, by_class: bool = False) -> dict[str, Tensor]:
        """Scalars to add up over batches and ranks; `loss` has gradients, `labels` is the number of samples.

        by_class: also how often each class was right, predicted and true, for a macro F1.
        """
        losses = self(logits, labels)
        logits = logits.detach().float()
        sums = {"loss": losses.sum(), "labels": losses.new_full((), float(len(losses)))}
        if self.problem_type == "regression":
            return {**sums, "absolute": (logits - labels).abs().mean(-1).sum()}
        if self.problem_type == "single_label_classification":
            predicted, true = (self._one_hot(classes) for classes in (logits.argmax(-1), labels))
        else:
            predicted, true = logits > 0, labels > 0.5
        right = predicted & true
        sums["correct"] = (predicted == true).all(-1).float().sum()
        for name, found in (("right", right), ("predicted", predicted), ("true", true)):
            if self.problem_type == "multi_label_classification":
                sums[name] = found.float().sum()
            if by_class:
                sums.update({f"{name}/{i}": count for i, count in enumerate(found.float().sum(0).unbind())})
        return sums

    def _one_hot(self, classes: Tensor) -> Tensor:
        return classes[:, None] == torch.arange(self.num_labels, device=classes.device)

    def total(self, sums: dict[str, Tensor]) -> Tensor:
        """The mean, of sums whose `labels` may be the global batch's: its micro batches' results then add up."""
        return sums["loss"] / torch.as_tensor(sums["labels"]).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches.

        `accuracy`: samples of which every label is right. `micro_f1`: over all labels; `macro_f1`: the mean over classes, 0
        for one that is neither predicted nor there, as scikit-learn has it. `mae`: mean absolute error.
        """
        count = max(sums["labels"], 1.0)
        found = {"loss": sums["loss"] / count}
        if self.problem_type == "regression":
            return {**found, "mae": sums["absolute"] / count}
        found["accuracy"] = sums["correct"] / count
        if "right" in sums:
            found["micro_f1"] = _f1(sums, "")
        if "right/0" in sums:
            found["macro_f1"] = sum(_f1(sums, f"/{i}") for i in range(self.num_labels)) / self.num_labels
        return found


def _f1(sums: dict[str, float], of: str) -> float:
    return 2 * sums[f"right{of}"] / max(sums[f"predicted{of}"] + sums[f"true{of}"], 1.0)
