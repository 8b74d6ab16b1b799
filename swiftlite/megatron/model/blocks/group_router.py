"""Routing limited to the best groups of experts, where DeepSeek's models rank groups otherwise than megatron-core.

That ranks them by the sum of their best topk // group_topk scores; DeepSeek-V2 by the best score, V3 by the sum of two.
"""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.router import ChoosingRouter


class GroupMaxRouter(ChoosingRouter):
    """Top K of the best groups; weights are the plain softmax scores times the scaling factor."""

    ranked_by = 1  # scores of a group that are added up

    def choose(self, scores: Tensor) -> Tensor:
        groups = scores.view(len(scores), self.config.moe_router_num_groups, -1)  # [T, groups, E / groups]
        ranks = groups.topk(self.ranked_by, dim=-1).values.sum(-1)
        best = ranks.topk(self.config.moe_router_group_topk, dim=-1).indices
        others = ranks.new_ones(ranks.shape).scatter(1, best, 0.0).bool().unsqueeze(-1)
        return groups.masked_fill(others, float("-inf")).flatten(1).topk(self.topk, dim=-1).indices


class GroupSumRouter(GroupMaxRouter):
    """The same by two scores: sigmoids, to which the correction bias is added for the choice; the weights' sum is 1."""

    ranked_by = 2
    normalise = True

    def scores(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        return super().choose(scores if self.expert_bias is None else scores + self.expert_bias)


def replacements(args: MegatronArguments) -> dict[object, object]:
    """Plain top-k, and groups that megatron-core ranks by two scores too, are its own."""
    model = args.description
    if not model.moe_router_num_groups:
        return {}
    if model.moe_router_score_function == "softmax":
        return {TopKRouter: GroupMaxRouter}
    same = (model.moe_router_topk or 0) // (model.moe_router_group_topk or 1) == GroupSumRouter.ranked_by
    return {} if same else {TopKRouter: GroupSumRouter}
