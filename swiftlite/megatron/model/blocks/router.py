"""The router of every model here: megatron-core's choice of experts, with losses and counts over real tokens only.

What megatron-core makes of them differs from the sum a user asks for (RouterLoss): with per-token loss it multiplies by
the tokens of a rank and divides by the trained ones, joined samples count as one, and its padding mask reaches neither
later pipeline stages under sequence parallelism nor MTP layers.

Shapes: S positions and B rows of a micro batch, T = S * B tokens of this rank, E experts, K experts of one token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from megatron.core import parallel_state as mpu
from megatron.core.transformer.moe import router
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    router_gating_linear,
    topk_routing_with_score_function,
)
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.train.router_loss import PADDING, RouterLoss


@dataclass(frozen=True)
class BatchTokens:
    """What routers need to know of a micro batch beside its hidden states.

    sequences: int64 [B, S], the sequence of each token, PADDING for none. lengths: tokens of each sequence.
    weight: what a router's loss is multiplied with, so that the step's gradients hold its share.
    """

    sequences: Tensor
    lengths: Tensor
    weight: Tensor | float = 1.0


_current: ContextVar[BatchTokens | None] = ContextVar("tokens of the micro batch that runs", default=None)


@contextmanager
def routing_of(tokens: BatchTokens | None) -> Iterator[None]:
    """Routers that run inside take `tokens` into account; so do their recomputations later (shim recompute_context)."""
    before = _current.set(tokens)
    try:
        yield
    finally:
        _current.reset(before)


class TopKRouter(router.TopKRouter):  # type: ignore[misc]
    """As megatron-core's, and listed by its name in module trees, with `loss`, a RouterLoss or None.

    Without BatchTokens all tokens are real and rows are sequences.
    """

    loss: RouterLoss | None = None

    def gating(self, tokens: Tensor) -> Tensor:
        """Hidden states [S, B, H] -> logits [S, B, E], the bias added afterwards.

        Transformer Engine's product reads a bias in bf16 as one in fp32 where the result is fp32 (2.20, measured).
        """
        if self.bias is None:
            return super().gating(tokens)  # type: ignore[no-any-return]
        dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(self.config.moe_router_dtype, tokens.dtype)
        logits: Tensor = router_gating_linear(tokens, self.weight, None, dtype)
        return logits + self.bias.to(dtype)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, E] -> weights [T, E], zero where not chosen; boolean map [T, E]."""
        probs, chosen = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
        )
        return probs, chosen

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E] -> weights and map as `route` gives them, without what exceeds the experts' capacity."""
        seq_length, batch = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        tokens = _current.get() or _all_real(seq_length * self._parts(), batch, logits.device)
        sequences = self._mine(tokens.sequences, seq_length)
        real = (sequences != PADDING).unsqueeze(-1)
        probs, chosen = self.route(logits)
        if self.training and torch.is_grad_enabled():
            if self.loss is not None:
                loss = self.loss(logits, sequences, tokens.lengths, self._add_up)
                probs = MoEAuxLossAutoScaler.apply(probs, loss * tokens.weight)
            if self.weight.requires_grad:  # the bias of a frozen router stays as it is
                self._apply_expert_bias(chosen & real)
        if self.config.moe_expert_capacity_factor is not None:
            probs, chosen = self._within_capacity(probs, chosen, real)
        return probs, chosen

    def _parts(self) -> int:
        """Ranks that each hold a part of every sequence."""
        return int(self.tp_group.size()) if self.config.sequence_parallel else 1

    def _mine(self, sequences: Tensor, seq_length: int) -> Tensor:
        """[B, S] of whole sequences -> [T] of this rank, in the order of its logits."""
        start = self.tp_group.rank() * seq_length if self._parts() > 1 else 0
        return sequences[:, start : start + seq_length].t().reshape(-1)

    def _add_up(self, counts: Tensor) -> Tensor:
        if self._parts() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_group)
        if self.config.context_parallel_size > 1:
            torch.distributed.all_reduce(counts, group=mpu.get_context_parallel_group())
        return counts

    def _within_capacity(self, probs: Tensor, chosen: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keep of each expert's tokens the first by --moe_token_drop_policy, up to its share of this rank's real ones.

        With moe_pad_expert_input_to_capacity every expert gets as many tokens as the dispatcher's buffers hold, which
        count padding; those beyond its own have weight 0.
        """
        chosen = chosen & real
        capacity = self._capacity(int(real.sum()))
        if self.config.moe_token_drop_policy == "probs":
            rank = probs.detach().float()
        else:
            rank = torch.arange(len(probs), 0, -1, device=probs.device).unsqueeze(-1).expand_as(probs).float()
        order = torch.where(chosen, rank, -1.0).argsort(dim=0, descending=True, stable=True)
        place = order.argsort(dim=0)
        kept = chosen & (place < capacity)
        if self.config.moe_pad_expert_input_to_capacity:
            return probs * kept, place < self._capacity(len(probs))
        return probs * kept, kept

    def _capacity(self, tokens: int) -> int:
        """As megatron-core's dispatchers compute it."""
        return math.ceil((tokens * self.topk / self.config.num_moe_experts) * self.config.moe_expert_capacity_factor)


def _all_real(seq_length: int, batch: int, device: torch.device) -> BatchTokens:
    rows = torch.arange(batch, device=device)
    return BatchTokens(rows[:, None].expand(batch, seq_length), torch.full_like(rows, seq_length))


class ChoosingRouter(TopKRouter):
    """`scores` in fp32 of all experts; `choose` picks K of them; their scores, normalised or not, weigh them."""

    normalise = False

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [T, E] -> scores [T, E], fp32."""
        return torch.softmax(logits, dim=-1, dtype=torch.float32)

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> indices of the chosen experts [T, K]."""
        raise NotImplementedError

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(logits)
        indices = self.choose(scores.detach())
        weights = scores.gather(1, indices)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        weights = weights * (self.config.moe_router_topk_scaling_factor or 1.0)
        probs = torch.zeros_like(scores).scatter(1, indices, weights).type_as(logits)
        return probs, torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)


def set_router_losses(models: Sequence[torch.nn.Module], args: MegatronArguments) -> bool:
    """Give every router of the models the loss that the arguments ask for. Returns: whether they ask for one."""
    loss = RouterLoss.of(args, vars(args.description))
    for module in (m for model in models for m in model.modules()):
        if isinstance(module, TopKRouter):
            module.loss = loss
    return loss is not None
