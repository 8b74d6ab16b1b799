"""DeepSeek-V2's group-limited routing: groups of experts rank by their best score.

megatron-core ranks them by the sum of their best topk / topk_group scores, which chooses other experts.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.router import ChoosingRouter


class GroupMaxRouter(ChoosingRouter):
    """Top K of the best groups; weights are the plain softmax scores times the scaling factor."""

    def choose(self, scores: Tensor) -> Tensor:
        groups = scores.view(len(scores), self.config.moe_router_num_groups, -1)  # [T, groups, E / groups]
        best = groups.amax(-1).topk(self.config.moe_router_group_topk, dim=-1).indices
        allowed = scores.new_zeros(groups.shape[:2]).scatter(1, best, 1.0).unsqueeze(-1)
        return (groups * allowed).flatten(1).topk(self.topk, dim=-1).indices


def replacements(args: MegatronArguments) -> dict[Any, Any]:
    """Plain top-k (V2-Lite) is megatron-core's own."""
    return {TopKRouter: GroupMaxRouter} if args.description.moe_router_num_groups else {}
