"""ERNIE 4.5's router: softmax scores plus a correction bias choose the experts, the scores alone weigh them.

megatron-core allows a bias only with sigmoid scores.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.router import ChoosingRouter


class SoftmaxBiasRouter(ChoosingRouter):
    """`expert_bias` [E] is an fp32 buffer, as in megatron-core's sigmoid router; training leaves it as it is."""

    normalise = True

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        del self.expert_bias
        self.register_buffer(
            "expert_bias",
            torch.zeros(self.config.num_moe_experts, dtype=torch.float32, device=self.weight.device),
        )

    def choose(self, scores: Tensor) -> Tensor:
        return (scores + self.expert_bias).topk(self.topk, dim=-1).indices


def replacements(args: MegatronArguments) -> dict[object, object]:
    return {TopKRouter: SoftmaxBiasRouter}
