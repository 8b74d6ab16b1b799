"""Rows of new tokens in embedding and output layer, trained along with LoRA: what peft calls trainable tokens.

The matrices stay frozen. Hooks on the layers put trained rows in the place of theirs, wherever they are read. Every rank
holds all trained rows, as there are few, and works with those of its part of the vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Settings
from swiftlite.weights.merged import EMBEDDING, HEAD, TOKENS
from swiftlite.weights.rule import text_name

Rows = Mapping[
    str, tuple[Sequence[int], Tensor]
]  # matrix, by its Hugging Face name -> ids of tokens, their rows [n, H]


class TokenRows(torch.nn.Module):
    """The trained rows `delta` [n, H] of one matrix on this rank. S: positions, B: rows of a micro batch."""

    ids: Tensor  # [n]
    mine: Tensor  # which of them are scored on this rank
    columns: Tensor  # and where among its logits

    def __init__(
        self, weight: str, ids: Sequence[int], values: Tensor, adapters: Any, config: TransformerConfig
    ) -> None:
        super().__init__()
        self.key = weight.removesuffix(".weight") + TOKENS
        self.owner = weakref.ref(adapters)  # says whether adapters are in use
        self.group: Any = mpu.get_tensor_model_parallel_group()
        self.sequence_parallel = config.sequence_parallel and self.group.size() > 1
        self.register_buffer("ids", torch.tensor(ids), False)
        self.delta = torch.nn.Parameter(values.to(config.params_dtype).contiguous())

    def read_in(self, embedding: Any) -> None:
        embedding.register_forward_hook(self._embed, with_kwargs=True)

    def score_in(self, layer: Any) -> None:
        size = layer.output_size_per_partition
        here = self.ids // size == self.group.rank()
        self.register_buffer("mine", here.nonzero().flatten(), False)
        self.register_buffer("columns", self.ids[here] % size, False)
        layer.register_forward_hook(self._score)

    def _summed(self) -> Tensor:
        """The rows, for a computation of which each rank does a part: their gradient is the sum of the ranks'."""
        return copy_to_tensor_model_parallel_region(self.delta, group=self.group)  # type: ignore[no-any-return]

    def _embed(self, _: object, args: tuple[Tensor, ...], kwargs: Settings, output: Tensor) -> Tensor:
        """output [S, B, H] of tokens [B, S]; under sequence parallelism it is this rank's part of S."""
        if not self.owner().enabled:  # type: ignore[union-attr]
            return output
        tokens = (args[0] if args else kwargs["input_ids"]).t()
        if self.sequence_parallel:
            tokens = tokens.chunk(self.group.size())[self.group.rank()]
        found = tokens.unsqueeze(-1) == self.ids
        rows = F.embedding(found.int().argmax(-1), self._summed() if self.sequence_parallel else self.delta)
        return torch.where(found.any(-1, keepdim=True), rows.to(output.dtype), output)

    def _score(self, layer: Any, args: tuple[Tensor, ...], output: tuple[Tensor, object]) -> tuple[Tensor, object]:
        """output: logits [S, B, this rank's part of the vocabulary] of hidden states [S, B, H]."""
        if not self.owner().enabled:  # type: ignore[union-attr]
            return output
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(args[0], True, group=self.group)
        else:
            hidden = copy_to_tensor_model_parallel_region(args[0], group=self.group)
        scores = F.linear(hidden, self._summed()[self.mine])
        return output[0].index_copy(-1, self.columns, scores.to(output[0].dtype)), output[1]

    def shards(self) -> dict[str, ShardedTensor]:
        """The parameter as part of the adapter, see Lora.shards."""
        replica = (0, self.group.rank(), mpu.get_data_parallel_rank(True))
        return {"delta": ShardedTensor.from_rank_offsets(self.key, self.delta, replica_id=replica)}


def add_rows(model: MegatronModule, adapters: Any, rows: Rows) -> None:
    """Have a model chunk train rows as a part of its adapters.

    Raises: UsageError where the rows of one matrix would be on two pipeline stages.
    """
    config, tied = model.config, model.share_embeddings_and_output_weights
    if rows and mpu.get_pipeline_model_parallel_world_size() > 1 and (tied or config.mtp_num_layers):
        why = "its output layer is the embedding" if tied else "MTP blocks read the embedding too"
        raise UsageError(
            f"--train_type lora with new tokens: {why}, and LoRA does not train rows on two pipeline stages; use "
            "--pipeline_model_parallel_size 1, or --train_type full"
        )
    embedding, head = getattr(model, "embedding", None), model.output_layer if model.post_process else None
    for weight, (ids, values) in rows.items():
        is_read, is_scored = text_name(weight) == EMBEDDING and embedding is not None, text_name(weight) == HEAD or tied
        if is_read or (is_scored and head is not None):
            trained = TokenRows(weight, ids, values, adapters, config)
            adapters.add_module(weight.split(".")[-2], trained)
            if is_read:
                trained.read_in(embedding)
            if is_scored and head is not None:
                trained.score_in(head)
