"""What training takes on each GPU, computed from config.json: weights, gradients, optimizer, activations of any layout.

No model is built and megatron-core is not imported. Letters: H hidden, T tokens of one micro batch on one rank.
Activations are what fused GPU kernels and flash attention keep for the backward pass; plain PyTorch kernels keep up to
twice that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

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

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
# Parts of a layer (TrainingModel.layer_parts). A fused input is that of a projection with which Transformer Engine computes
# the norm, which is no module of its own then.
_MLP = ("mlp", "mlp's gated", "routed", "experts", "experts' gated", "shared")
# Module -> parts that are not kept if it is recomputed, and that wait on the host.
_RECOMPUTED = {
    "layernorm": ("attention input", "mlp input"), "mla_up_proj": ("qkv",),
    "mlp": ("fused mlp input", "mlp", "mlp's gated"), "moe": ("routed", "experts", "experts' gated", "shared"),
    "moe_act": ("experts' gated",), "shared_experts": ("shared",),
}  # fmt: skip
_OFFLOADED = {
    "attn_norm": ("attention norm",), "qkv_linear": ("attention input", "fused attention input"), "core_attn": ("qkv",),
    "attn_proj": ("attention output",), "mlp_norm": ("mlp norm",), "expert_fc1": ("routed",), "moe_act": ("experts",),
}  # fmt: skip
# Inputs of linear layers that nothing but these keeps: in FP8, with an fp32 scale for 128 of them, if they compute in it.
_IN_FP8 = ("fused attention input", "fused mlp input", "mlp's gated", "routed", "experts' gated")
# Of a sequence that is divided, each rank has at least so many tokens: fewer are no work for a GPU.
LEAST_TOKENS = 4096

# What a divergence between student and teacher takes for each of the student's logits (measured): of the mixture that
# --beta between 0 and 1 makes, of a KL divergence, of a teacher whose likeliest tokens alone are known. It is made of so
# many logits at a time.
DIVERGENCE_BYTES = {"mixture": 52, "kl": 28, "top": 25}
DIVERGENCE_LOGITS = 1 << 25

# Logits of a pass up to which they are made at once, and of a chunk beyond that: 4 GB and 1 GB in bf16.
MOST_LOGITS = 1 << 31
CHUNK_LOGITS = 1 << 29


def logits_at_once(args: MegatronArguments, tokens: int, vocab: int) -> int:
    """Of a pass over `tokens`, those whose logits are in memory at a time. vocab: rows on a rank."""
    if args.loss_chunk_size is not None:
        return min(args.loss_chunk_size, tokens)
    return tokens if tokens * vocab <= MOST_LOGITS else max(CHUNK_LOGITS // vocab, 1)


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
    cp: int = 1
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
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_dp(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // (self.pp * self.ep * self.etp)

    def flags(self) -> list[str]:
        """Words of `swiftlite megatron sft` that ask for this layout."""
        sizes = {"tensor_model_parallel_size": self.tp, "pipeline_model_parallel_size": self.pp,
                 "context_parallel_size": self.cp, "expert_model_parallel_size": self.ep}  # fmt: skip
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
    """Bytes on the fullest GPU. host: in main memory, for that GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    overhead: int = OVERHEAD_BYTES
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.overhead


class Form(NamedTuple):
    """What tensors that take the same memory have in common.

    rows: of a vocabulary, else 0. size: elements, of one row where there are rows. adapter: elements of LoRA beside it.
    """

    rows: int
    size: int
    divided: bool
    is_expert: bool
    is_buffer: bool
    is_trained: bool
    adapter: int

    def whole(self, tp: int = 1) -> int:
        """Elements over all TP ranks. Rows of a vocabulary are padded, so that every rank has as many."""
        return math.ceil(self.rows / tp) * tp * self.size if self.rows else self.size


@dataclass(frozen=True)
class TrainingModel:
    """What the formulas need to know.

    args: MegatronArguments with the model's fields set. dtype: of the weights. sequences: of a sample; a preference pair
    has two. beside: a frozen model that stays next to the trained one. loss_bytes: that a loss of whole distributions takes
    for each logit, see DIVERGENCE_BYTES; None: cross entropy.
    adapters: Hugging Face module -> rank, of a run that trains LoRA adapters. trained: Hugging Face names of the weights
    that are trained themselves; None: all, or none beside adapters.
    """

    bound: BoundMap
    args: MegatronArguments
    dtype: torch.dtype
    sequences: int = 1
    beside: BoundMap | None = None
    loss_bytes: int | None = None
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

    @cached_property
    def forms(self) -> dict[int | str, Counter[Form]]:
        """Of each place in `entries`, how many entries have which form: a layer has few, however many experts."""
        return {place: Counter(map(self._form, entries)) for place, entries in self.entries.items()}

    def _form(self, entry: Entry) -> Form:
        rows = entry.shape[0] if "vocab" in entry.rule.hf[0].dims else 0
        return Form(
            rows=rows,
            size=math.prod(entry.shape[1:] if rows else entry.shape),
            divided=entry.mcore.endswith(_DIVIDED),
            is_expert=entry.expert is not None,
            is_buffer=entry.rule.is_buffer,
            is_trained=self._is_trained(entry),
            adapter=self._adapter_size(entry),
        )

    @property
    def num_trained(self) -> int:
        """What gets gradients and optimizer states."""
        counted = sum(self.forms.values(), Counter[Form]())
        return sum(number * (form.adapter + form.whole() * form.is_trained) for form, number in counted.items())

    def _is_trained(self, entry: Entry) -> bool:
        """The weight itself; what Megatron keeps in one matrix is trained together."""
        chosen = self.adapters is None if self.trained is None else any(name in self.trained for name in entry.hf)
        return chosen and not entry.rule.is_buffer

    def _adapter_size(self, entry: Entry) -> int:
        ranks = [(self.adapters or {}).get(name.removesuffix(".weight"), 0) for name in entry.hf]
        first = [self.bound.by_hf[name][0] is entry for name in entry.hf]  # a pair counts once
        return sum(r * sum(s) for r, s, counts in zip(ranks, entry.hf_shapes, first, strict=True) if counts)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model without MTP blocks; buffers do not count."""
        return sum(math.prod(e.shape) for part in self.entries.values() for e in part if not e.rule.is_buffer)

    def stage(self, layout: Layout, rank: int) -> Counter[Form]:
        """What a pipeline stage has of each form; with tied embeddings the last one has a copy."""
        places: list[int | str] = [*self._placed(layout).layers(rank)]
        if rank == 0:
            places.append("first")
        if rank == layout.pp - 1:
            places.append("last")
            if self.bound.model.tied and layout.pp > 1:
                places.append("first")
        found = Counter[Form]()
        for place in places:
            found.update(self.forms[place])
        return found

    def _placed(self, layout: Layout) -> Layout:
        return layout if layout.stages else replace(layout, stages=even_stages(self.bound.model.num_layers, layout.pp))

    def elements(self, layout: Layout, rank: int, trained: bool = False) -> tuple[int, int, int]:
        """(dense parameters, expert parameters, fp32 buffers) on one GPU of a pipeline stage; of what is trained only."""
        dense = experts = buffers = 0
        for form, number in self.stage(layout, rank).items():
            if trained and not form.is_trained:
                continue
            size = number * form.whole(layout.tp)
            if form.is_buffer:
                buffers += size
            elif form.is_expert:
                experts += size
            else:
                dense += number * (form.whole(layout.tp) // layout.tp) if form.divided else size
        return dense, experts // (layout.ep * layout.etp), buffers

    @cached_property
    def other(self) -> TrainingModel | None:
        """The frozen model."""
        return None if self.beside is None else replace(self, bound=self.beside, beside=None, adapters=None, trained=())

    def _beside_bytes(self, layout: Layout, rank: int) -> int:
        """Weights of the frozen model on one GPU of a pipeline stage."""
        if self.other is None:
            return 0
        if self.other.bound.model.num_layers != sum(layout.stages):
            layout = replace(layout, stages=())
        dense, experts, buffers = self.other.elements(layout, rank)
        return (dense + experts) * self.dtype.itemsize + 4 * buffers

    def need(self, layout: Layout, micro_batch_size: int, seq_length: int, num_microbatches: int) -> MemoryUse:
        """Bytes on the GPU of the pipeline stage that takes most."""
        tokens = micro_batch_size * self.sequences * seq_length // layout.cp
        return max((self._stage_need(layout, rank, tokens, num_microbatches) for rank in range(layout.pp)),
                   key=lambda need: need.total)  # fmt: skip

    def _stage_need(self, layout: Layout, rank: int, tokens: int, num_microbatches: int) -> MemoryUse:
        dense, experts, buffers = self.elements(layout, rank)
        weights = (dense + experts) * self.dtype.itemsize + 4 * buffers + self._beside_bytes(layout, rank)
        if self.args.fp8_format:  # beside each weight of a layer its FP8 form, and that transposed
            ends = (rank == 0) + (rank == layout.pp - 1)
            weights += 2 * max(
                dense + experts - ends * self.bound.model.vocab * self.bound.model.hidden // layout.tp, 0
            )
        dense, experts, _ = self.elements(layout, rank, trained=True)
        # Adapters are in fp32, at most whole on each TP rank.
        forms = self.stage(layout, rank).items()
        beside = sum(number * form.adapter for form, number in forms if not form.is_expert)
        in_experts = sum(number * form.adapter for form, number in forms if form.is_expert) // layout.ep
        weights += 4 * (beside + in_experts)
        dense, experts = dense + beside, experts + in_experts
        states = math.ceil(dense / (layout.dp * layout.cp)) + math.ceil(experts / layout.expert_dp)
        offloaded = int(states * self.args.optimizer_offload_fraction) if self.args.optimizer_cpu_offload else 0
        activations, on_host = self._activations(layout, rank, tokens, num_microbatches)
        return MemoryUse(
            weights=weights,
            gradients=(dense + experts) * _BYTES[self.args.main_grads_dtype],
            optimizer=(states - offloaded) * self._bytes_of_states(),
            activations=activations,
            host=offloaded * 16 + on_host,  # two moments, the weight and its gradient
        )

    def _bytes_of_states(self) -> int:
        """What the optimizer keeps of one trained weight: two moments and the fp32 main weight, or their lower forms."""
        args = self.args
        if self.dtype == torch.float32:
            return 8
        if not args.use_precision_aware_optimizer or args.optimizer_cpu_offload:
            return 12
        return sum(_BYTES[dtype] for dtype in (args.exp_avg_dtype, args.exp_avg_sq_dtype, args.main_params_dtype))

    def _activations(self, layout: Layout, rank: int, tokens: int, num_microbatches: int) -> tuple[int, int]:
        """(on the GPU, on the host) of the micro batches that a stage has begun and not yet gone back through."""
        layout, width = self._placed(layout), self.dtype.itemsize
        parts = [self.layer_parts(layout, i, tokens) for i in layout.layers(rank)]
        away = set(_OFFLOADED if self.args.fine_grained_activation_offloading else ())
        away = {name for module in away.intersection(self.args.offload_modules) for name in _OFFLOADED[module]}
        made_again = self._recomputed(layout)
        kept = sum(size for part in parts for name, size in part.items() if name not in away | made_again)
        if layout.recompute == "full":
            made_again = {name for part in parts for name in part}
            row = tokens * self.bound.model.hidden * width // (layout.tp if layout.sequence_parallel else 1)
            kept = row * len(parts)
        in_flight = layout.in_flight(rank, num_microbatches)
        # Beside what is kept stands what the backward pass of a layer takes, or before it that of the loss.
        takes = [sum(part.get(name, 0) for name in made_again) + self._gradients(part) for part in parts]
        if rank == layout.pp - 1:
            takes.append(self._loss(layout, tokens, num_microbatches))
        total = math.ceil(kept * in_flight) + max(takes, default=0)
        return total, math.ceil(sum(part.get(name, 0) for part in parts for name in away - made_again) * in_flight)

    @staticmethod
    def _gradients(part: Mapping[str, int]) -> int:
        """Bytes of those of a layer's parts that are there at a time: of its attention or its MLP, and two rows."""
        rows, mlp = part["attention norm"] + part["mlp norm"], sum(part.get(name, 0) for name in _MLP)
        return rows + max(mlp, sum(part.values()) - rows - mlp)

    def _loss(self, layout: Layout, tokens: int, num_microbatches: int) -> int:
        """Bytes that the output layer and the loss take until their backward pass has ended."""
        m, width = self.bound.model, self.dtype.itemsize
        rows = m.vocab // layout.tp if m.num_labels is None else max(m.num_labels, 1)
        if self.loss_bytes is not None:
            # Logits of all tokens with a label, taken to be all, their gradients; a teacher's of the whole step.
            kept = width * num_microbatches if self.beside is not None else 0
            return tokens * rows * (4 * width + kept) + min(tokens * rows, DIVERGENCE_LOGITS) * self.loss_bytes
        at_once = logits_at_once(self.args, tokens, rows)
        # The fused loss writes the gradient over the logits; the plain one makes both in fp32.
        logits = at_once * rows * (width if self.args.cross_entropy_loss_fusion is not False else width + 8)
        places: tuple[str, ...] = ("first", "last") if m.tied else ("last",)
        trained = any(form.rows and form.is_trained for place in places for form in self.forms[place])
        # Of the weight the gradient of a chunk and their sum in fp32; of the last hidden states these and their gradient.
        weight = rows * m.hidden * (width + 4 * (at_once < tokens)) if trained else 0
        return logits + weight + 2 * tokens * m.hidden * width

    def _recomputed(self, layout: Layout) -> set[str]:
        modules = self.args.recompute_modules if layout.recompute == "selective" else ()
        return {name for module in modules for name in _RECOMPUTED.get(module, ())}

    def layer_activations(self, layout: Layout, layer: int, tokens: int) -> int:
        """What one layer keeps of one micro batch without recomputation."""
        return sum(self.layer_parts(layout, layer, tokens).values())

    def layer_parts(self, layout: Layout, layer: int, tokens: int) -> dict[str, int]:
        """Bytes of it by what they are."""
        m, tp = self.bound.model, layout.tp
        whole = tokens // (tp if layout.sequence_parallel else 1)
        row = whole * m.hidden
        values = {"attention norm": row, "mlp norm": row, "attention input" if m.mla else "fused attention input": row,
                  "mlp input" if m.moe_layers[layer] else "fused mlp input": row}  # fmt: skip
        values |= self._attention(layer, tokens, tp)
        if self._scores_are_kept(layout):
            values["scores"] = tokens * (self.args.seq_length or tokens) * m.heads // tp
        if m.moe_layers[layer]:
            routed = tokens * int(self.args.description.moe_router_topk) * layout.etp // tp
            if layout.ep == 2:  # on GPUs each of two ranks has room for all tokens of both (model/experts.py)
                routed *= 2
            wide = routed * m.moe_ffn // layout.etp
            values |= {"routed": routed * m.hidden, "experts": 2 * wide, "experts' gated": wide,
                       "shared": 3 * tokens * m.shared_ffn // tp}  # fmt: skip
        else:
            values |= {"mlp": 2 * tokens * m.ffn // tp, "mlp's gated": tokens * m.ffn // tp}
        found = {name: size * self.dtype.itemsize for name, size in values.items()}
        if self.args.fp8_format:
            found |= {name: found[name] * 33 // 64 for name in _IN_FP8 if name in found}
            # With delayed scaling attention's projection keeps its FP8 input besides; others quantise it again.
            if self.args.fp8_recipe == "delayed" and "attention output" in values:
                found["attention output"] += values["attention output"]
        if m.moe_layers[layer]:
            found["router"] = 4 * 2 * whole * m.experts  # logits and probabilities in fp32
        return found

    def _attention(self, layer: int, tokens: int, tp: int) -> dict[str, int]:
        """Values that attention, or what stands in its place, keeps between its two products."""
        m = self.bound.model
        if m.layer_kinds[layer].linear:  # as torch computes it, in fp32 and chunks of 64 tokens; kernels keep less
            head = 4 * m.key_dim + 4 * m.value_dim + m.key_dim * m.value_dim // 64 + 12 * 64
            in_fp32 = (m.value_heads * head + 2 * m.linear_values) * 4 // self.dtype.itemsize
            return {"linear attention": tokens * (2 * m.linear_qkv + 3 * m.linear_values + in_fp32) // tp}
        output = tokens * m.attn_cols // tp
        if m.mla:
            qkv = tokens * (2 * m.q_rows + m.kv_up_rows) // tp
            return {"latents": tokens * (m.q_lora + m.kv_down_rows) * 2, "qkv": qkv, "attention output": output}
        gates = m.q_rows if self.args.description.attention_output_gate else 0
        qkv = tokens * (m.q_rows + gates + 2 * m.kv_rows) // tp
        normed = self.args.description.qk_layernorm
        before = {"heads before norms": tokens * (m.q_rows + m.kv_rows) // tp} if normed else {}
        return {"qkv": qkv, "attention output": output, **before}

    def _scores_are_kept(self, layout: Layout) -> bool:
        return self.args.attention_backend == "unfused" and layout.recompute is None

    def layouts(self, gpus: int, seq_length: int = 0) -> Iterator[Layout]:
        """Every layout that megatron-core can build on that many GPUs, TP within a node; long sequences divided or not."""
        m = self.bound.model
        for tp in _divisors(math.gcd(gpus, GPUS_PER_NODE)):
            if m.heads % tp or m.key_heads % tp or (not m.mla and m.groups % tp) or (m.ffn and m.ffn % tp):
                continue
            for pp in _divisors(gpus // tp):
                stages = even_stages(m.num_layers, pp)
                for cp in _divisors(gpus // (tp * pp)) if stages else ():
                    if cp == 1 or seq_length // cp >= LEAST_TOKENS:
                        yield from self._with_experts(Layout(tp, pp, dp=gpus // (tp * pp * cp), cp=cp, stages=stages))

    def _with_experts(self, layout: Layout) -> Iterator[Layout]:
        m, ranks = self.bound.model, layout.gpus // layout.pp
        for ep in _divisors(ranks) if m.experts else [1]:
            for etp in self._expert_parts(layout.tp):
                if m.experts and (m.experts % ep or ranks % (ep * etp) or m.moe_ffn % etp):
                    continue
                for mode in MODES:
                    yield replace(layout, ep=ep, etp=etp, recompute=mode)

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
        for layout in self.layouts(gpus, seq_length):
            per_pass = micro_batch_size * layout.dp
            if global_batch_size % per_pass:
                continue
            need = self.need(layout, micro_batch_size, seq_length, global_batch_size // per_pass)
            if need.total <= gpu_memory:
                found.append((layout, need))

        def cost(item: tuple[Layout, MemoryUse]) -> tuple[bool, int, int, int, int, int]:
            layout, need = item
            recomputes = layout.recompute == "full"
            return recomputes, layout.tp * layout.etp, layout.cp, layout.pp, layout.ep, need.total

        return sorted(found, key=cost)

    def smallest(
        self, gpus: int, micro_batch_size: int, seq_length: int, num_microbatches: int
    ) -> tuple[Layout, MemoryUse]:
        """The layout that takes least, whatever it costs in speed."""
        needs = (
            (la, self.need(la, micro_batch_size, seq_length, num_microbatches)) for la in self.layouts(gpus, seq_length)
        )
        return min(needs, key=lambda item: item[1].total)


def even_stages(num_layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage: equal, or fewer in the last one, which has the output layer too; () if it would have none."""
    most = math.ceil(num_layers / pp)
    last = num_layers - most * (pp - 1)
    return (most,) * (pp - 1) + (last,) if last > 0 else ()


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
