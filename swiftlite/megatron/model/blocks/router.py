"""A top-k router whose choice of experts a family writes itself; losses and bookkeeping stay megatron-core's.

Shapes: T tokens, E experts, K experts of one token.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class ChoosingRouter(TopKRouter):
    """Softmax over all experts in fp32; `choose` picks K of them; their scores, normalised or not, weigh them."""

    normalise = False

    def choose(self, scores: Tensor) -> Tensor:
        """Scores [T, E] -> indices of the chosen experts [T, K]."""
        raise NotImplementedError

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E] -> weights [T, E] in the logits' dtype, zero where not chosen; boolean map [T, E]."""
        seq_length, batch = logits.shape[:2]
        logits = logits.view(-1, self.config.num_moe_experts)
        mask = None if padding_mask is None else padding_mask.reshape(-1)
        logits = self.apply_z_loss(logits, padding_mask=mask)
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        indices = self.choose(scores.detach())
        weights = scores.gather(1, indices)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        weights = weights * (self.config.moe_router_topk_scaling_factor or 1.0)
        probs = torch.zeros_like(scores).scatter(1, indices, weights).type_as(logits)
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices, True)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            padded = mask is not None
            chosen, aux_scores = compute_routing_scores_for_aux_loss(
                logits, self.topk, self.score_function, fused=self.config.moe_router_fusion, padding_mask=mask
            )
            probs = self._apply_aux_loss(probs, aux_scores, chosen, with_padding_mask=padded)
            probs = self._apply_seq_aux_loss(probs, aux_scores, chosen, seq_length, batch, with_padding_mask=padded)
            probs = self._apply_global_aux_loss(probs, aux_scores, chosen, with_padding_mask=padded)
        return probs, routing_map
