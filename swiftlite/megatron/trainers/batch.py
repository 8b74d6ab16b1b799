"""How samples become tensors. Deterministic: nothing depends on the parallel layout.

Shapes: B samples of a micro batch, S sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.llm.template.collate import join_rows, round_up, sample_lengths
from swiftlite.megatron.context import places
from swiftlite.megatron.distributed import ParallelState
from swiftlite.megatron.model.blocks.router import BatchTokens
from swiftlite.megatron.model.config import to_transformer_config, virtual_stages
from swiftlite.megatron.model.experts import gathers
from swiftlite.train.batches import DUMMY, to_device
from swiftlite.train.channels import Channels
from swiftlite.train.order import Samples, Stream
from swiftlite.train.router_loss import PADDING
from swiftlite.utils.types import Json, Settings

IGNORE_INDEX = -100
_SAMPLES = 64  # a joined sequence has so many samples or a multiple of it, where shapes are to stay the same


@dataclass
class MicroBatch:
    """One forward pass. Labels are shifted: labels[:, t] is the token at t + 1.

    tokens, labels, position_ids: int64 [B, S]. loss_mask: fp32 [B, S], the weight of each label; 0 in prompt and
    padding. num_tokens: tokens that are not padding. sample_lengths: tokens of each sample. cu_seqlens: int32, where
    each sample of a joined sequence begins and the last one ends (B is 1 then); None where each row is one sample.
    longest: no sample of a joined sequence is longer; known on the host, so that nobody waits for the device to say so.
    sequences, lengths, router_weight: see BatchTokens. channels: int64 [B, S], see train.channels, where it is asked for.
    Under context parallelism tensors [B, S] are this rank's part; the other fields are of whole samples.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    loss_mask: Tensor
    num_tokens: int
    cu_seqlens: Tensor | None = None
    sample_lengths: tuple[int, ...] = ()
    longest: int = 0
    sequences: Tensor | None = None
    lengths: Tensor | None = None
    router_weight: Tensor | float = 1.0
    channels: Tensor | None = None

    def router_tokens(self) -> BatchTokens:
        """Which tokens are real, and of which sample."""
        assert self.sequences is not None and self.lengths is not None
        return BatchTokens(self.sequences, self.lengths, self.router_weight)

    @property
    def packed_seq_params(self) -> PackedSeqParams | None:
        """What tells attention and rotary embedding where the samples of a joined sequence begin."""
        if self.cu_seqlens is None:
            return None
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_kv=self.cu_seqlens,
            cu_seqlens_q_padded=self.cu_seqlens,  # Transformer Engine asks for them under context parallelism
            cu_seqlens_kv_padded=self.cu_seqlens,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )

    def part(self, size: int, rank: int) -> Self:
        """What one of `size` ranks of context parallelism holds."""
        shape = self.tokens.shape
        mine = places(shape[1], self.cu_seqlens, size, rank)
        whole = {name: v for name, v in vars(self).items() if isinstance(v, Tensor) and v.shape == shape}
        changes: Settings = {name: v[:, mine] for name, v in whole.items()}
        return replace(self, **changes)

    def to(self, device: torch.device) -> Self:
        moved: Settings = {n: to_device(v, device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(rows: Sequence[Json], pad_token_id: int = 0, multiple_of: int = 1, at_least: int = 0) -> MicroBatch:
    """Pad rows {"input_ids", "labels", "loss_scale"?} on the right to one length, a multiple of `multiple_of`.

    at_least: shortest length.

    Padding stands behind the text, so causal attention never reads it.
    """
    longest = max(at_least, *(len(row["input_ids"]) for row in rows))
    length = round_up(longest, multiple_of)
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
    lengths = torch.tensor(sizes)
    sequences = torch.where(positions < lengths[:, None], torch.arange(len(rows))[:, None], PADDING)
    return MicroBatch(
        tokens, labels, positions, mask, sum(sizes), sample_lengths=sizes, sequences=sequences, lengths=lengths
    )


def collate_joined(
    rows: Sequence[Json],
    pad_token_id: int = 0,
    multiple_of: int = 1,
    at_least: int = 0,
    sample_multiple: int = 1,
) -> MicroBatch:
    """Join rows, packed sequences or samples, to one sequence [1, S]; padding behind them is a sample of its own.

    sample_multiple: samples are padded to a multiple of it, which divides `multiple_of`.
    """
    real = [n for row in rows for n in sample_lengths(row)]
    lengths = [round_up(n, sample_multiple) for n in real]
    total = round_up(max(sum(lengths), at_least), multiple_of)
    if total > sum(lengths):
        lengths.append(total - sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    sample = torch.arange(len(lengths)).repeat_interleave(bounds.diff())  # of each place
    positions = torch.arange(total) - bounds[sample]
    there = positions < torch.tensor([*real, 0])[sample]
    text = collate([join_rows(rows)], pad_token_id)

    def spread(values: Tensor, fill: int) -> Tensor:
        whole = values.new_full((1, total), fill)
        whole[0, there] = values[0]
        return whole

    return MicroBatch(
        tokens=spread(text.tokens, pad_token_id),
        labels=spread(text.labels, 0),
        position_ids=positions.unsqueeze(0),
        loss_mask=spread(text.loss_mask, 0),
        num_tokens=sum(real),
        cu_seqlens=bounds.to(torch.int32),
        sample_lengths=tuple(real),
        longest=max(lengths),
        sequences=torch.where(there, sample, PADDING).unsqueeze(0),
        lengths=torch.tensor(real),
    )


def _same_shapes(batches: Sequence[MicroBatch]) -> None:
    """Let joined sequences have equally many samples, of which the last ones are empty, and one bound of their length."""
    bounds = [batch.cu_seqlens for batch in batches if batch.cu_seqlens is not None]
    count = round_up(max(len(found) for found in bounds), _SAMPLES)
    for batch, found in zip(batches, bounds, strict=True):
        batch.cu_seqlens = torch.cat([found, found[-1:].expand(count - len(found))])
        assert batch.lengths is not None
        batch.lengths = torch.nn.functional.pad(batch.lengths, (0, count - len(batch.lengths)))
        batch.longest = batch.tokens.shape[1]


class BatchLoader:
    """Makes the micro batches of a step from an EncodedDataset.

    one_length: all of a step have the longest one's length. join: a micro batch is one sequence without padding.
    group: ranks whose micro batches of one pass have one length, over gloo; loading is collective then.
    room: tokens that every joined sequence is filled up to, so that all steps have the same shapes; 0: none.
    context: ranks that share samples, and which of them this one is.
    """

    def __init__(
        self,
        dataset: Samples | Stream,
        pad_token_id: int,
        multiple_of: int,
        device: torch.device,
        one_length: bool = False,
        join: bool = False,
        group: torch.distributed.ProcessGroup | None = None,
        room: int = 0,
        context: tuple[int, int] = (1, 0),
    ) -> None:
        self.dataset, self.pad_token_id = dataset, pad_token_id
        self.multiple_of, self.device = multiple_of, device
        self.one_length, self.join = one_length, join
        self.group, self.room = group, room
        self.context = context
        self.channels: Channels | None = None

    @classmethod
    def of(
        cls,
        dataset: Samples | Stream,
        args: MegatronSftArguments,
        parallel: ParallelState,
        micro_batch_size: int,
        pad_token_id: int,
        device: torch.device,
    ) -> Self:
        """As the layout and the kernels of a run need it."""
        # All but the all-to-all of chosen tokens exchange as many tokens as one rank has, taking others to have the same.
        even = args.moe_token_dispatcher_type != "alltoall" or args.moe_pad_expert_input_to_capacity
        even = even or (parallel.ep_size > 1 and gathers(args, to_transformer_config(args)))
        # Packed sequences are nearly full; filled up they have one shape, which can be captured.
        fills = args.packing and device.type == "cuda" and args.cuda_graph is not False
        multiple = args.length_unit * (parallel.tp_size if args.sequence_parallel else 1)
        if parallel.cp_size > 1:
            multiple = parallel.cp_size * math.lcm(2, multiple)
        return cls(
            dataset, pad_token_id, multiple, device,
            one_length=virtual_stages(args) is not None,
            join=bool(args.packing or args.padding_free),
            group=mpu.get_data_parallel_group_gloo() if even and parallel.ep_size > 1 else None,
            room=(args.max_length or 0) * micro_batch_size if fills else 0,
            context=(parallel.cp_size, parallel.cp_rank),
        )  # fmt: skip

    def load(self, micro_batches: Sequence[Sequence[int]]) -> list[MicroBatch]:
        passes = self.passes(micro_batches)
        size, rank = self.context
        sample_multiple = 2 * size if size > 1 else 1
        join = partial(collate_joined, sample_multiple=sample_multiple) if self.join else collate
        batches = [
            join(rows, self.pad_token_id, self.multiple_of, length)
            for rows, length in zip(passes, self._lengths(passes, sample_multiple), strict=True)
        ]
        if self.channels is not None:
            for rows, batch in zip(passes, batches, strict=True):
                assert batch.sequences is not None
                batch.channels = self.channels.numbers(rows)[batch.sequences.clamp(min=0)]
        if self.room:
            _same_shapes(batches)
        batches = [self.complete(s, batch) for s, batch in zip(micro_batches, batches, strict=True)]
        return [(batch.part(size, rank) if size > 1 else batch).to(self.device) for batch in batches]

    def passes(self, micro_batches: Sequence[Sequence[int]]) -> list[list[Json]]:
        """The rows of each pass."""
        return [self.rows(samples) for samples in micro_batches]

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> MicroBatch:
        """What else a pass over these samples needs, before the batch is divided."""
        return batch

    def _lengths(self, passes: Sequence[Sequence[Json]], sample_multiple: int) -> list[int]:
        """The length that each pass has at least."""

        def measure(rows: Sequence[Json]) -> int:
            if not self.join:
                return max(len(row["input_ids"]) for row in rows)
            return sum(round_up(n, sample_multiple) for row in rows for n in sample_lengths(row))

        lengths = [max(measure(rows), self.room) for rows in passes]
        if self.one_length:
            lengths = [max(lengths)] * len(lengths)
        if self.group is not None:
            agreed = torch.tensor(lengths)  # on the host: the device is busy with the step before
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.group)
            lengths = agreed.tolist()
        return lengths

    def rows(self, samples: Sequence[int]) -> list[Json]:
        """What one pass runs through the model."""
        dummy = {"input_ids": [self.pad_token_id] * 2, "labels": [IGNORE_INDEX] * 2}
        return [dummy if i == DUMMY else self.dataset[i] for i in samples]
