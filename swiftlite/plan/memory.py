"""What training takes on each GPU, computed from config.json: weights, gradients, optimizer, activations of any layout.

No model is built and megatron-core is not imported. Letters: H hidden, T tokens of one micro batch on one rank.
Activations are what fused GPU kernels and flash attention keep for the backward pass; plain PyTorch kernels keep up to
twice that.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.weights.rule import BoundMap, Entry

OVERHEAD_BYTES = 3_000_000_000  # CUDA context, NCCL buffers, fragments
GPUS_PER_NODE = 8
# What is tried, cheapest first. With flash attention "selective" (the default) keeps as much as no recomputation.
MODES = ("selective", "full")

# Divided over TP ranks; what is not named here is whole on each of them.
_DIVIDED = (
    "word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_proj.weight",
    "linear_fc1.weight", "linear_fc2.weight", "linear_q_proj.weight", "linear_q_up_proj.weight",
    "linear_kv_up_proj.weight", "eh_proj.weight", "softmax_offset", "linear_fc1.bias", "out_proj.weight", "dt_bias", "A_log",
    *(f"{matrix}.weight.{part}" for matrix in ("in_proj", "conv1d") for part in ("query", "key", "value")),
    *(f"in_proj.weight.{part}" for part in ("z", "beta", "alpha")),
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, layers of each model chunk (arguments/pipeline.py), what is recomputed (None, selective, full).

    chunks: of a stage in an interleaved pipeline, which takes turns between them.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    stages: tuple[int, ...] = ()
    recompute: str | None = None
    sequence_parallel: bool = True
    chunks: int = 1

    def layers(self, rank: int) -> list[int]:
        """Numbers of the layers that a pipeline stage holds."""
        numbers = range(rank, len(self.stages), self.pp)
        starts = [(sum(self.stages[:number]), self.stages[number]) for number in numbers]
        return [layer for first, count in starts for layer in range(first, first + count)]

    def in_flight(self, rank: int, num_microbatches: int) -> float:
        """Micro batches that a stage has begun and not yet gone back through, at most (1F1B); parts of one count."""
        if self.chunks == 1:
            return min(self.pp - rank, num_microbatches)
        warmup = 2 * (self.pp - rank - 1) + (self.chunks - 1) * self.pp
        return min(warmup + 1, num_microbatches * self.chunks) / self.chunks

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pp * self.ep * self.etp)

    def flags(self) -> list[str]:
        """Words of `swiftlite megatron sft` that ask for this layout."""
        sizes = {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp,
                 "expert_model_parallel_size": self.ep}  # fmt: skip
        words = [word for name, size in sizes.items() if size > 1 for word in (f"--{name}", str(size))]
        if self.etp != self.tp:
            words += ["--expert_tensor_parallel_size", str(self.etp)]
        if self.tp > 1 and self.sequence_parallel:
            words += ["--sequence_parallel", "true"]
        if self.stages and self.stages[-1] != self.stages[0]:
            words += ["--decoder_last_pipeline_num_layers", str(self.stages[-1])]
        if self.chunks > 1:
            words += ["--num_virtual_stages_per_pipeline_rank", str(self.chunks)]
        if self.recompute == "full":
            words += "--recompute_granularity full --recompute_method uniform --recompute_num_layers 1".split()
        return words


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the fullest GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int = OVERHEAD_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


@dataclass(frozen=True)
class TrainingModel:
    """What the formulas need to know.

    args: MegatronArguments with the model's fields set. dtype: of the weights. sequences: of a sample; a preference pair
    has two. reference: a frozen model of this size stays next to the trained one.
    adapters: Hugging Face module -> rank, of a run that trains only LoRA adapters. trained: Hugging Face names, of one
    that freezes the others.
    """

    bound: BoundMap
    args: MegatronArguments
    dtype: torch.dtype
    sequences: int = 1
    reference: bool = False
    adapters: Mapping[str, int] | None = None
    trained: Collection[str] | None = None

    @cached_property
    def entries(self) -> dict[int | str, list[Entry]]:
        """Entries by layer; 'first' and 'last' are what the ends of the pipeline hold. MTP blocks are not trained."""
        by_place: dict[int | str, list[Entry]] = {"first": [], "last": []}
        for entry in self.bound.entries:
            if entry.rule.carried:
                continue
            if entry.stack == "decoder.layers" and entry.index is not None:
                by_place.setdefault(entry.index, []).append(entry)
            elif entry.stack is None:
                by_place["first" if entry.mcore.startswith("embedding.") else "last"].append(entry)
        return by_place

    @property
    def num_trained(self) -> int:
        """What gets gradients and optimizer states."""
        if self.trained is not None:
            return sum(math.prod(e.shape) for part in self.entries.values() for e in part if self._is_trained(e))
        if self.adapters is None:
            return self.num_parameters
        return sum(self._adapter_size(entry) for part in self.entries.values() for entry in part)

    def _is_trained(self, entry: Entry) -> bool:
        """Of a run on the weights themselves; what Megatron keeps in one matrix is trained together."""
        return not entry.rule.is_buffer and (self.trained is None or any(name in self.trained for name in entry.hf))

    def _adapter_size(self, entry: Entry) -> int:
        ranks = [(self.adapters or {}).get(name.removesuffix(".weight"), 0) for name in entry.hf]
        first = [self.bound.by_hf[name][0] is entry for name in entry.hf]  # a pair counts once
        return sum(r * sum(s) for r, s, counts in zip(ranks, entry.hf_shapes, first, strict=True) if counts)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model without MTP blocks; buffers do not count."""
        return sum(math.prod(e.shape) for part in self.entries.values() for e in part if not e.rule.is_buffer)

    def stage(self, layout: Layout, rank: int) -> list[Entry]:
        """Entries of a pipeline stage; with tied embeddings the last one has a copy."""
        found = [e for layer in self._placed(layout).layers(rank) for e in self.entries[layer]]
        if rank == 0:
            found += self.entries["first"]
        if rank == layout.pp - 1:
            found += self.entries["last"]
            if self.bound.model.tied and layout.pp > 1:
                found += self.entries["first"]
        return found

    def _placed(self, layout: Layout) -> Layout:
        return layout if layout.stages else replace(layout, stages=even_stages(self.bound.model.num_layers, layout.pp))

    def elements(self, layout: Layout, rank: int, trained: bool = False) -> tuple[int, int, int]:
        """(dense parameters, expert parameters, fp32 buffers) on one GPU of a pipeline stage; of what is trained only."""
        dense = experts = buffers = 0
        for entry in self.stage(layout, rank):
            if trained and not self._is_trained(entry):
                continue
            shape = entry.shape
            if "vocab" in entry.rule.hf[0].dims:  # rows are padded, so that every rank has as many
                shape = (math.ceil(shape[0] / layout.tp) * layout.tp, *shape[1:])
            size = math.prod(shape)
            if entry.rule.is_buffer:
                buffers += size
            elif entry.expert is not None:
                experts += size
            else:
                dense += size // layout.tp if entry.mcore.endswith(_DIVIDED) else size
        return dense, experts // (layout.ep * layout.etp), buffers

    def need(self, layout: Layout, micro_batch_size: int, seq_length: int, num_microbatches: int) -> MemoryUse:
        """Bytes on the GPU of the pipeline stage that takes most."""
        tokens = micro_batch_size * self.sequences * seq_length // self.args.context_parallel_size
        return max((self._stage_need(layout, rank, tokens, num_microbatches) for rank in range(layout.pp)),
                   key=lambda need: need.total)  # fmt: skip

    def _stage_need(self, layout: Layout, rank: int, tokens: int, num_microbatches: int) -> MemoryUse:
        dense, experts, buffers = self.elements(layout, rank)
        width = self.dtype.itemsize
        per_parameter = 8 if self.dtype == torch.float32 else 12  # two moments, and fp32 main weights
        weights = ((dense + experts) * width + 4 * buffers) * (2 if self.reference else 1)
        if self.adapters is not None:  # in fp32, at most whole on each TP rank
            stage = self.stage(layout, rank)
            dense = sum(self._adapter_size(entry) for entry in stage if entry.expert is None)
            experts = sum(self._adapter_size(entry) for entry in stage if entry.expert is not None) // layout.ep
            weights += 4 * (dense + experts)
        elif self.trained is not None:
            dense, experts, _ = self.elements(layout, rank, trained=True)
        return MemoryUse(
            weights=weights,
            gradients=(dense + experts) * 4,
            optimizer=per_parameter * (math.ceil(dense / layout.dp) + math.ceil(experts / layout.expert_dp)),
            activations=self._activations(layout, rank, tokens, num_microbatches),
        )

    def _activations(self, layout: Layout, rank: int, tokens: int, num_microbatches: int) -> int:
        """Of the micro batches that a stage has begun and not yet gone back through."""
        layout, width = self._placed(layout), self.dtype.itemsize
        layers = [self.layer_activations(layout, i, tokens) for i in layout.layers(rank)]
        kept = sum(layers)
        extra = 0
        if layout.recompute == "full":
            row = tokens * self.bound.model.hidden * width // (layout.tp if layout.sequence_parallel else 1)
            kept, extra = row * len(layers), max(layers)
        total = math.ceil(kept * layout.in_flight(rank, num_microbatches)) + extra
        if rank == layout.pp - 1:  # logits in the model's dtype, in fp32, and their gradient
            total += tokens * self.bound.model.vocab // layout.tp * (width + 8)
        return total

    def layer_activations(self, layout: Layout, layer: int, tokens: int) -> int:
        """What one layer keeps of one micro batch without recomputation."""
        m, args = self.bound.model, self.args
        width, tp = self.dtype.itemsize, layout.tp
        whole = tokens // (tp if layout.sequence_parallel else 1)
        values = 4 * whole * m.hidden  # input and output of both norms
        if m.layer_kinds[layer].linear:  # around convolution, rule and norm, and what chunks of 64 tokens keep
            heads = m.value_heads * (2 * m.key_dim + 2 * 64)
            values += tokens * (2 * m.linear_qkv + 4 * m.linear_values + heads) // tp
        elif m.mla:
            values += tokens * (m.q_lora + m.kv_down_rows) * 2 + tokens * (2 * m.q_rows + m.kv_up_rows) // tp
        else:
            gates = m.q_rows if args.description.attention_output_gate else 0
            values += tokens * (m.q_rows + gates + 2 * m.kv_rows) // tp
        values += 0 if m.layer_kinds[layer].linear else tokens * m.attn_cols // tp
        if self._scores_are_kept(layout):
            values += tokens * (args.seq_length or tokens) * m.heads // tp
        if not m.moe_layers[layer]:
            return (values + 3 * tokens * m.ffn // tp) * width
        routed = tokens * int(args.description.moe_router_topk) * layout.etp // tp
        if layout.ep == 2:  # on GPUs each of two ranks has room for all tokens of both (model/experts.py)
            routed *= 2
        values += routed * m.hidden + 3 * routed * m.moe_ffn // layout.etp + 3 * tokens * m.shared_ffn // tp
        return values * width + 4 * 2 * whole * m.experts  # router: logits and probabilities in fp32

    def _scores_are_kept(self, layout: Layout) -> bool:
        return self.args.attention_backend == "unfused" and layout.recompute is None

    def layouts(self, gpus: int) -> Iterator[Layout]:
        """Every layout that megatron-core can build on that many GPUs, TP within a node."""
        m = self.bound.model
        for tp in _divisors(math.gcd(gpus, GPUS_PER_NODE)):
            if m.heads % tp or (not m.mla and m.groups % tp) or (m.ffn and m.ffn % tp):
                continue
            for pp in _divisors(gpus // tp):
                stages = even_stages(m.num_layers, pp)
                if not stages:
                    continue
                dp = gpus // (tp * pp)
                for ep in _divisors(gpus // pp) if m.experts else [1]:
                    for etp in self._expert_parts(tp):
                        if m.experts and (m.experts % ep or (gpus // pp) % (ep * etp) or m.moe_ffn % etp):
                            continue
                        for mode in MODES:
                            yield Layout(tp, pp, ep, etp, dp, stages, mode)

    def _expert_parts(self, tp: int) -> set[int]:
        """Over how many ranks an expert may be divided; one with biases over none."""
        if not self.bound.model.experts:
            return {tp}
        return {1, tp} if self.args.description.disable_bias_linear else {1}

    def fitting(
        self, gpus: int, gpu_memory: int, micro_batch_size: int, seq_length: int, global_batch_size: int
    ) -> list[tuple[Layout, MemoryUse]]:
        """Layouts whose fullest GPU has room, those that compute fastest first: little recomputation, then few ranks that
        have to talk within a layer, then few pipeline stages."""
        found = []
        for layout in self.layouts(gpus):
            per_pass = micro_batch_size * layout.dp
            if global_batch_size % per_pass:
                continue
            need = self.need(layout, micro_batch_size, seq_length, global_batch_size // per_pass)
            if need.total <= gpu_memory:
                found.append((layout, need))
        return sorted(found, key=lambda item: (
            item[0].recompute == "full", item[0].tp * item[0].etp, item[0].pp, item[0].ep, item[1].total))  # fmt: skip

    def smallest(
        self, gpus: int, micro_batch_size: int, seq_length: int, num_microbatches: int
    ) -> tuple[Layout, MemoryUse]:
        """The layout that takes least, whatever it costs in speed."""
        needs = ((la, self.need(la, micro_batch_size, seq_length, num_microbatches)) for la in self.layouts(gpus))
        return min(needs, key=lambda item: item[1].total)


def even_stages(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage: equal, or fewer in the last one, which has the output layer too; () if it would have none."""
    most = math.ceil(num_layers / pp)
    last = num_layers - most * (pp - 1)
    return (most,) * (pp - 1) + (last,) if last > 0 else ()


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
