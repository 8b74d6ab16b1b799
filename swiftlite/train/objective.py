"""What a step minimises on the Hugging Face side: sums over a micro batch that add up over a global batch.

Shapes: B rows of a micro batch, S tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from swiftlite.train.channels import Channels
from swiftlite.train.dpo_loss import IGNORE_INDEX

Batch = dict[str, Tensor]


class Objective(Protocol):
    """`counts` are the sums that a loss is divided by; they are known before any model runs.

    sums: scalars of a micro batch, `counts` among them; those in the loss have gradients.
    loss: of sums whose counts may be the global batch's: the losses of its micro batches then add up.
    metrics: a log line's values from sums over any number of batches; `loss` is one of them.
    """

    counts: tuple[str, ...]

    def count(self, batch: Batch) -> list[int]: ...

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]: ...

    def loss(self, sums: dict[str, Tensor]) -> Tensor: ...

    def metrics(self, sums: dict[str, float]) -> dict[str, float]: ...


class LanguageModeling:
    """Cross entropy on the labels, weighted by `loss_scale` where a batch has it; a mean over the tokens with a label.

    by_probability: while training, each token's loss is weighted by its probability too (arXiv 2508.05629).
    channels: their losses are told one by one; batches say with `channels` [B, S] which one a token belongs to.
    """

    counts: tuple[str, ...] = ("trained_tokens",)

    def __init__(self, by_probability: bool = False, channels: Channels | None = None) -> None:
        self.by_probability, self.channels = by_probability, channels

    def count(self, batch: Batch) -> list[int]:
        return [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_scale", "channels")}
        targets = batch["labels"][:, 1:].flatten()
        # The last token predicts nothing, unless its label came along: the next rank's first one.
        logits = model(**inputs).logits[:, : batch["labels"].shape[1] - 1].flatten(0, 1).float()
        weights, by_probability = batch.get("loss_scale"), self.by_probability and model.training
        if weights is None and not by_probability and self.channels is None:
            loss = cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        else:
            losses = cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
            if by_probability:
                losses = losses * torch.exp(-losses.detach())
            losses = losses if weights is None else losses * weights[:, 1:].flatten()
            loss = losses.sum()
        counted = targets != IGNORE_INDEX
        sums = {"loss": loss, "trained_tokens": counted.sum()}
        return sums | self.channels.sums(losses, counted, batch["channels"][:, 1:]) if self.channels else sums

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["loss"] / torch.as_tensor(sums["trained_tokens"]).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = {"loss": sums["loss"] / max(sums["trained_tokens"], 1.0)}
        return found | self.channels.metrics(sums) if self.channels else found
