"""What stands in the place of an output layer: the head of classifiers, reward models and rerankers, which gives a score for
each label instead of logits over a vocabulary; nothing, for embeddings; the output layer for last tokens alone.

Shapes: S positions, B rows, H hidden size, L labels, N samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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


_ends: ContextVar[Tensor] = ContextVar("ends")


@contextmanager
def at_last_tokens(ends: Tensor) -> Iterator[None]:
    """Have models inside compute what stands in the place of their output layer at some tokens alone, where they can.

    ends: int64 [N], places in B x S of this rank's part of the sequences under context parallelism.
    """
    token = _ends.set(ends)
    try:
        yield
    finally:
        _ends.reset(token)


def _last_tokens(hidden: Tensor, sequence_parallel: bool) -> Tensor:
    """[N, 1, H] of hidden [S, B, H], of which ranks have parts under sequence parallelism. Collective."""
    if sequence_parallel:  # as in ScoreHead
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.transpose(0, 1).flatten(0, 1)[_ends.get()].unsqueeze(1)


class NoHead(torch.nn.Module):
    """In the place of GPTModel's output layer: the hidden states of last tokens as they are."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel: bool = config.sequence_parallel

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """hidden: [S, B, H], this rank's positions under sequence parallelism. Returns: [N, 1, H]."""
        return _last_tokens(hidden, self.sequence_parallel), None


def judge_last_tokens(model: torch.nn.Module) -> None:
    """Let the output layer of a GPTModel, if it has one here, give logits [N, 1, V] of last tokens alone."""
    layer = getattr(model, "output_layer", None)
    if layer is None:
        return
    divided = layer.sequence_parallel
    # It sees the same tokens on all ranks, so their gradients are to be added up.
    layer.sequence_parallel, layer.allreduce_dgrad = False, layer.allreduce_dgrad or divided

    def before(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _last_tokens(inputs[0], divided), *inputs[1:]

    layer.register_forward_pre_hook(before)
