"""The loss of long sequences without all of their logits: a chunk of tokens at a time, made again in the backward pass.

Shapes: S positions of this rank, B rows, H hidden size, V the vocabulary's rows on this rank, N ranks whose parts of the
sequence the output layer gathers (1 without sequence parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import gpt_model
from torch import Tensor

from swiftlite.megatron.model.head import NoHead

LossOf = Callable[[Tensor, slice], Tensor]  # hidden states [s, B, H] and where they stand -> losses [B, N, s]


class GPTModel(gpt_model.GPTModel):  # type: ignore[misc]
    """As megatron-core's, and listed by its name in module trees. logits_at_once: see plan.memory."""

    logits_at_once: Callable[[int, int], int]

    def _postprocess(self, hidden_states: Tensor, **others: object) -> Tensor:
        positions, rows = self._positions(hidden_states) if self.post_process else (0, 0)
        if others["labels"] is None or positions >= rows:
            return super()._postprocess(hidden_states=hidden_states, **others)  # type: ignore[no-any-return]

        self.__dict__["output_layer"] = _Deferred(self.output_layer, positions)  # in front of the module of that name
        try:
            return super()._postprocess(hidden_states=hidden_states, **others)  # type: ignore[no-any-return]
        finally:
            del self.__dict__["output_layer"]

    def sharded_state_dict(self, *args: object, **kwargs: object) -> object:
        """megatron-core looks for the weight of an output layer on the last stage, which embedding models do not have."""
        after = self.__dict__["post_process"]
        headless = isinstance(getattr(self, "output_layer", None), NoHead)
        self.post_process = after and not headless
        try:
            return super().sharded_state_dict(*args, **kwargs)
        finally:
            self.post_process = after

    def _gathered(self) -> int:
        """N."""
        return int(self.config.tensor_model_parallel_size) if self.config.sequence_parallel else 1

    def _positions(self, hidden: Tensor) -> tuple[int, int]:
        """(positions of a chunk, S)."""
        tokens = hidden.shape[1] * self._gathered()  # of a position
        rows = self.vocab_size // self.config.tensor_model_parallel_size
        return max(self.logits_at_once(len(hidden) * tokens, rows) // tokens, 1), len(hidden)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses [B, S * N] of labels [B, S * N]; where the output layer was put off, `logits` are hidden states."""
        deferred: _Deferred | None = self.__dict__.get("output_layer")
        if deferred is None:
            return super().compute_language_model_loss(labels, logits)  # type: ignore[no-any-return]
        layer, weight = deferred.layer, deferred.given
        usual = super().compute_language_model_loss
        spread = labels.unflatten(1, (self._gathered(), len(logits)))

        def loss_of(hidden: Tensor, part: slice) -> Tensor:
            found = layer(hidden, weight=weight)[0]
            losses: Tensor = usual(spread[:, :, part].flatten(1).contiguous(), found)
            return losses.unflatten(1, (self._gathered(), len(hidden)))

        size = math.ceil(len(logits) / math.ceil(len(logits) / deferred.positions))
        parts = [slice(start, start + size) for start in range(0, len(logits), size)]
        losses: Tensor = _InChunks.apply(loss_of, parts, logits, *_trained(layer, weight))
        return losses.flatten(1)


class _Deferred:
    """Stands for the output layer and gives the hidden states back. given: the weight it was called with, if tied."""

    def __init__(self, layer: torch.nn.Module, positions: int) -> None:
        self.layer, self.positions = layer, positions
        self.given: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor | None = None, **_: object) -> tuple[Tensor, None]:
        self.given = weight
        return hidden, None

    def __getattr__(self, name: str) -> object:
        return getattr(self.layer, name)


def _trained(layer: torch.nn.Module, weight: Tensor | None) -> list[Tensor]:
    """What gets gradients by the output layer: its own or the embedding's weight, and rows that a hook adds (LoRA)."""
    owners = [getattr(hook, "__self__", None) for hook in layer._forward_hooks.values()]
    found: list[Tensor] = list(layer.parameters())
    found += [p for owner in owners if isinstance(owner, torch.nn.Module) for p in owner.parameters()]
    if weight is not None and all(weight is not parameter for parameter in found):  # on a last stage it is its own
        found.append(weight)
    return [parameter for parameter in found if parameter.requires_grad]


class _InChunks(torch.autograd.Function):
    """loss_of over parts of hidden states, joined along the last dimension. Nothing but the hidden states is kept."""

    @staticmethod
    def forward(ctx: Any, loss_of: LossOf, parts: Sequence[slice], hidden: Tensor, *trained: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.loss_of, ctx.parts = loss_of, parts
        ctx.trained = trained
        return torch.cat([loss_of(hidden[part], part) for part in parts], dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        totals: list[Tensor | None] = [None] * len(ctx.trained)
        for part in ctx.parts:
            piece = hidden[part].detach().requires_grad_()
            with torch.enable_grad():
                losses = ctx.loss_of(piece, part)
            found = torch.autograd.grad(losses, [piece, *ctx.trained], gradient[..., part], allow_unused=True)
            of_hidden[part] = found[0]
            totals = [_add(t, f, p) for t, f, p in zip(totals, found[1:], ctx.trained, strict=True)]
        grads = (None if t is None else t.to(p.dtype) for t, p in zip(totals, ctx.trained, strict=True))
        return None, None, of_hidden, *grads


def _add(total: Tensor | None, found: Tensor | None, parameter: Tensor) -> Tensor | None:
    """In fp32; what a product has added to the parameter's `main_grad` itself stands for it and is not added again."""
    if found is None or getattr(parameter, "grad_added_to_main_grad", False):
        return found
    return found.float() if total is None else total.add_(found)
