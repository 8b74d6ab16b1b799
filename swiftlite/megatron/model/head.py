"""The head of classifiers, reward models and rerankers: a score for each label instead of logits over a vocabulary.

Shapes: S positions, B rows, H hidden size, L labels.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScoreHead(torch.nn.Module):
    """A linear layer [L, H] without bias, in the place and under the name of GPTModel's output layer.

    Every tensor parallel rank holds all of it. Under sequence parallelism a rank scores its own positions, and the scores
    are gathered, which are few; the weight is marked, so its gradient is summed over these ranks.
    """

    def __init__(self, config: TransformerConfig, num_labels: int) -> None:
        super().__init__()
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.empty(num_labels, config.hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(self.weight)

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """hidden: [S, B, H], this rank's positions under sequence parallelism. Returns: [S, B, L] of all positions."""
        scores = torch.nn.functional.linear(hidden, self.weight)
        if self.sequence_parallel:  # what follows is computed by all ranks alike, so each keeps its own gradient
            scores = gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False)
        return scores, None
