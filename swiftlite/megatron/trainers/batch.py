"""Which samples a step trains on, and how they become tensors. Deterministic: nothing depends on the parallel layout.

Shapes: B samples of a micro batch, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from swiftlite.llm.template.base import join_rows
from swiftlite.llm.train.router_loss import PADDING
from swiftlite.megatron.model.blocks.router import BatchTokens

IGNORE_INDEX = -100
_DUMMY = -1  # stands for a sample that is not there: it fills up the last batch of an evaluation


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a global batch are divided: `num_microbatches` passes of `micro_batch_size` on each DP rank."""

    micro_batch_size: int
    num_microbatches: int
    dp_rank: int
    dp_size: int

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.num_microbatches * self.dp_size

    def micro_batches(self, samples: Sequence[int]) -> list[list[int]]:
        """This rank's samples, one list per pass. Every rank gets the same number of samples in every pass."""
        per_pass = self.micro_batch_size * self.dp_size
        start = self.dp_rank * self.micro_batch_size
        return [
            list(samples[begin + start : begin + start + self.micro_batch_size])
            for begin in range(0, len(samples), per_pass)
        ]


def evaluation_samples(num_samples: int, global_batch_size: int, num_batches: int = -1) -> Iterator[list[int]]:
    """Global batches over a validation set, the last one filled up with samples that count for nothing.

    num_batches: stop after so many, -1: the whole set.
    """
    total = -(-num_samples // global_batch_size)
    for batch in range(total if num_batches < 0 else min(total, num_batches)):
        samples = list(range(batch * global_batch_size, min((batch + 1) * global_batch_size, num_samples)))
        yield samples + [_DUMMY] * (global_batch_size - len(samples))


@dataclass
class MicroBatch:
    """One forward pass. Labels are shifted: labels[:, t] is the token at t + 1.

    tokens, labels, position_ids: int64 [B, S]. loss_mask: fp32 [B, S], the weight of each label; 0 in prompt and
    padding. num_tokens: tokens that are no padding. sample_lengths: tokens of each sample. cu_seqlens: int32, where
    each sample of a joined sequence begins and the last one ends (B is 1 then); None where each row is one sample.
    router_weight: see BatchTokens.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    num_tokens: int
    cu_seqlens: Tensor | None = None
    sample_lengths: tuple[int, ...] = ()
    router_weight: Tensor | float = 1.0

    def router_tokens(self) -> BatchTokens:
        """Which tokens are real, and of which sample."""
        lengths = torch.tensor(self.sample_lengths, device=self.tokens.device)
        rows = torch.arange(len(lengths), device=self.tokens.device)
        if self.cu_seqlens is None:
            sequences = torch.where(self.position_ids < lengths[:, None], rows[:, None], PADDING)
        else:
            sequences = torch.full_like(self.tokens, PADDING)
            sequences[0, : sum(self.sample_lengths)] = torch.repeat_interleave(rows, lengths)
        return BatchTokens(sequences, lengths, self.router_weight)

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        """What tells attention and rotary embedding where the samples of a joined sequence begin."""
        if self.cu_seqlens is None:
            return None
        longest = int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            n: v.to(device, non_blocking=True) for n, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)


def collate(
    rows: Sequence[dict[str, Any]], pad_token_id: int = 0, multiple_of: int = 1, at_least: int = 0
) -> MicroBatch:
    """Pad rows {"input_ids", "labels", "loss_scale"?} on the right to one length, a multiple of `multiple_of`.

    at_least: shortest length.

    Padding stands behind the text, so causal attention never reads it.
    """
    longest = max(at_least, *(len(row["input_ids"]) for row in rows))
    length = -(-longest // multiple_of) * multiple_of
    tokens = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
    weights = torch.ones(len(rows), length)
    for i, row in enumerate(rows):
        count = len(row["input_ids"])
        tokens[i, :count] = torch.tensor(row["input_ids"])
        labels[i, : count - 1] = torch.tensor(row["labels"][1:], dtype=torch.int64)
        if row.get("loss_scale") is not None:
            weights[i, : count - 1] = torch.tensor(row["loss_scale"][1:], dtype=torch.float32)
    mask = (labels != IGNORE_INDEX).float() * weights
    labels = labels.masked_fill(labels == IGNORE_INDEX, 0)
    positions = torch.arange(length).expand(len(rows), length).contiguous()
    sizes = tuple(len(row["input_ids"]) for row in rows)
    return MicroBatch(tokens, labels, positions, mask, sum(sizes), sample_lengths=sizes)


def collate_joined(
    rows: Sequence[dict[str, Any]], pad_token_id: int = 0, multiple_of: int = 1, at_least: int = 0
) -> MicroBatch:
    """Join rows, packed sequences or samples, to one sequence [1, S]; padding is a sample of its own."""
    lengths = [n for row in rows for n in row.get("sample_lengths") or [len(row["input_ids"])]]
    batch = collate([join_rows(rows)], pad_token_id, multiple_of, at_least)
    size = batch.tokens.shape[1]
    used = sum(lengths)
    batch.sample_lengths = tuple(lengths)
    if size > used:
        lengths.append(size - used)
    batch.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch.position_ids = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    return batch


class BatchLoader:
    """Makes the micro batches of a step from an EncodedDataset.

    one_length: all of a step have the longest one's length. join: a micro batch is one sequence without padding.
    group: ranks whose micro batches of one pass have one length; loading is collective then.
    """

    def __init__(
        self,
        dataset: Any,
        pad_token_id: int,
        multiple_of: int,
        device: torch.device,
        one_length: bool = False,
        join: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.dataset, self.pad_token_id, self.multiple_of, self.device = dataset, pad_token_id, multiple_of, device
        self.one_length, self.join, self.group = one_length, join, group

    def load(self, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        passes = [self.rows(samples) for samples in micro_batches]
        join = collate_joined if self.join else collate
        return [
            join(rows, self.pad_token_id, self.multiple_of, length).to(self.device)
            for rows, length in zip(passes, self._lengths(passes), strict=True)
        ]

    def _lengths(self, passes: Sequence[Sequence[dict[str, Any]]]) -> list[int]:
        """The length that each pass has at least."""
        measure = sum if self.join else max
        lengths = [measure(len(row["input_ids"]) for row in rows) for rows in passes]
        if self.one_length:
            lengths = [max(lengths)] * len(lengths)
        if self.group is not None:
            agreed = torch.tensor(lengths, device=self.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.group)
            lengths = agreed.tolist()
        return lengths

    def rows(self, samples: Sequence[int]) -> list[dict[str, Any]]:
        """What one pass runs through the model."""
        dummy = {"input_ids": [self.pad_token_id] * 2, "labels": [IGNORE_INDEX] * 2}
        return [dummy if i == _DUMMY else self.dataset[i] for i in samples]
