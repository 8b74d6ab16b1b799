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
from swiftlite.train.plugins import TokenLoss

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

    token_loss: while training, what takes the place of each token's cross entropy.
    channels: their losses are told one by one; batches say with `channels` [B, S] which one a token belongs to.
    """

    counts: tuple[str, ...] = ("trained_tokens",)

    def __init__(self, token_loss: TokenLoss | None = None, channels: Channels | None = None) -> None:
        self.token_loss, self.channels = token_loss, channels

    def count(self, batch: Batch) -> list[int]:
        return [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "loss_scale", "channels")}
        targets = batch["labels"][:, 1:].flatten()
        # The last token predicts nothing, unless its label came along: the next rank's first one.
        logits = model(**inputs).logits[:, : batch["labels"].shape[1] - 1].flatten(0, 1).float()
        weights, token_loss = batch.get("loss_scale"), self.token_loss if model.training else None
        counted = targets != IGNORE_INDEX
        if weights is None and token_loss is None and self.channels is None:
            loss = cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        else:
            losses = cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
            if token_loss is not None:
                losses = token_loss(losses) * counted
            losses = losses if weights is None else losses * weights[:, 1:].flatten()
            loss = losses.sum()
        sums = {"loss": loss, "trained_tokens": counted.sum()}
        return sums | self.channels.sums(losses, counted, batch["channels"][:, 1:]) if self.channels else sums

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return sums["loss"] / torch.as_tensor(sums["trained_tokens"]).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        found = {"loss": sums["loss"] / max(sums["trained_tokens"], 1.0)}
        return found | self.channels.metrics(sums) if self.channels else found
