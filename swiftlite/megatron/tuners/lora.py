"""LoRA on live megatron-core models: one pair A [r, in], B [out, r] per Hugging Face weight, next to the layer it is in.

The layers themselves stay as they are; a hook adds B A x to their output. Pairs of experts that one layer holds are one
parameter [E, ...] for each projection, cut into the experts' own on disk. All pairs of a model chunk are in its child
`adapters`, which the model's own state leaves out: weights and adapters are saved apart.
Under tensor parallelism a layer that divides its output rows has B divided and A whole, one that divides its input
columns has A divided and B whole. What goes between the two is as narrow as the rank, so that is what ranks exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.megatron.model.layers import rms_norm
from swiftlite.megatron.shards import LiveMap, iter_shards, unwrap
from swiftlite.megatron.tuners.freeze import let_gradients_through
from swiftlite.megatron.tuners.lora_plan import LINEAR, LoraPlan, plan_lora, read_lora, with_new_rows
from swiftlite.megatron.tuners.rows import add_rows
from swiftlite.megatron.tuners.whole import WholeWeights
from swiftlite.utils.errors import UsageError
from swiftlite.weights.lora import A, B
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import BoundMap, Entry, clip


@dataclass
class LiveLinear:
    """A live linear layer, or one expert's part of one.

    weight: one of its parameters. group: place among the experts of a grouped layer, None for an ordinary one.
    expert: its number in the model. shards: (entry, offset, shape within it), in row order.
    """

    path: str
    module: torch.nn.Module
    weight: torch.nn.Parameter
    group: int | None
    expert: int | None
    shards: list[tuple[Entry, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        """The entries of which it holds something; linear attention's matrix has a few."""
        return list({entry.label: entry for entry, _, _ in self.shards}.values())

    @property
    def names(self) -> list[str]:
        """The Hugging Face weights in them."""
        return list(dict.fromkeys(name for entry in self.entries for name in entry.hf))


def live_linears(model: MegatronModule, bound: BoundMap) -> list[LiveLinear]:
    """The linear layers of a model chunk on this rank, before DDP."""
    owners = {
        p.untyped_storage().data_ptr(): (path, module, p, _group_of(name))
        for path, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False)
    }
    live, found = LiveMap(bound), dict[tuple[str, int | None], LiveLinear]()
    for shard in iter_shards([model]):
        entry, offset = live.entry(shard)
        if entry.stack == "decoder.layers" and LINEAR.search(f".{entry.name}"):
            path, module, weight, group = owners[shard.data.untyped_storage().data_ptr()]
            if weight.dim() == 3:  # one weight for all experts
                group = shard.data.storage_offset() // weight[0].numel()
            new = LiveLinear(path, module, weight, group, entry.expert)
            found.setdefault((path, entry.expert), new).shards.append((entry, offset, tuple(shard.local_shape[-2:])))
    return list(found.values())


def _group_of(parameter: str) -> int | None:
    """Grouped layers call their weights weight0, weight1, ..."""
    number = parameter.removeprefix("weight")
    return int(number) if number.isdigit() else None


@dataclass(frozen=True)
class PairShard:
    """This rank's part of a pair: some runs [start, stop) of rows of B, columns [start, stop) of A."""

    module: str
    shape: tuple[int, ...]  # [out, in] of the whole weight
    rank: int
    scale: float
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]

    @property
    def short(self) -> str:
        return self.module.rpartition(".")[2]

    def key(self, letter: str) -> str:
        """Hugging Face name of its A or B."""
        return self.module + (A if letter == "A" else B)


class Lora(torch.nn.Module):
    """The pairs of one linear layer, or of all experts that are in one: A [E, r, in], B [E, out, r] then.

    Ranks of experts are filled up with zeros to the largest, in whole 16 bytes, and so are experts without a pair. They
    stay zeros: each of the two has no gradient where the other one is zero.
    """

    order: Tensor | None  # where each row of the layer's output is among the blocks' rows; None: at the same place

    def __init__(
        self, linears: Sequence[LiveLinear], plan: LoraPlan, dropout: float, config: TransformerConfig
    ) -> None:
        """linears: one, or those of the layer's experts in their order.

        Raises: UsageError where TP ranks hold unequal parts of a weight.
        """
        super().__init__()
        linear, self.dropout = linears[0], dropout
        self.expert, self.grouped = linear.expert is not None, linear.group is not None
        parallel = mpu.get_expert_tensor_parallel_group if self.expert else mpu.get_tensor_model_parallel_group
        self.group: Any = parallel()
        self.size = self.group.size()
        self.divides_rows = sum(s[0] for _, _, s in linear.shards) < sum(e.shape[0] for e in linear.entries)
        self.divides_columns = linear.shards[0][2][1] < linear.entries[0].shape[1]
        self.sequence_parallel = config.sequence_parallel and self.size > 1
        self.shares = [_shares(one, plan) for one in linears]
        self.blocks, order = _blocks(linear.names, _held(linear))
        self.register_buffer("order", None if order == list(range(len(order))) else torch.tensor(order), False)
        self._scales: dict[object, Tensor] = {}
        reduced = getattr(linear.weight, "allreduce", True)
        for short in (short for short, _ in self.blocks if any(short in shares for shares in self.shares)):
            a, b = self._initial(short, plan, config.params_dtype)
            for letter, whole, divided, dim in (("A", a, self.divides_columns, -1), ("B", b, self.divides_rows, -2)):
                parameter: Any = torch.nn.Parameter(whole)
                parameter.allreduce = reduced  # False: belongs to the groups of expert parallelism
                if divided or (self.expert and self.group.rank() == 0):
                    set_tensor_model_parallel_attributes(parameter, True, whole.dim() + dim, 1)
                elif self.expert:
                    # Without it the gradient norm would count by the dense layers' ranks, which may be others.
                    parameter.shared = True
                elif self.sequence_parallel:
                    parameter.sequence_parallel = True  # each rank sees a part of the sequence: gradients are summed
                self.register_parameter(f"{short}_{letter}", parameter)

    def _initial(self, short: str, plan: LoraPlan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """This rank's part of A and B of the projection `short`."""
        a, b = list[Tensor | None](), list[Tensor | None]()
        for share in (shares.get(short) for shares in self.shares):
            wholes = plan.values(share.module) if share else None
            a.append(wholes[0][:, slice(*share.columns)].to(dtype).contiguous() if share and wholes else None)
            rows = [wholes[1][slice(*span)] for span in share.rows] if share and wholes else []
            b.append(torch.cat(rows).to(dtype) if rows else None)
        if not self.grouped:
            assert a[0] is not None and b[0] is not None
            return a[0], b[0]
        return _stacked(a, 0), _stacked(b, 1)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """x: what the linear layer reads on this rank, [..., in]; of experts [rows, in], sorted by expert.

        ends: int32 [experts], where each expert's rows end. Returns: what the layer's output lacks, [..., out].
        """

        def product(x: Tensor, matrix: Tensor) -> Tensor:
            return F.linear(x, matrix) if ends is None else F.grouped_mm(x, matrix.transpose(1, 2), offs=ends)

        pairs = self.pairs()
        a, b = zip(*(self.summed(a, (b * scale).to(b.dtype)) for a, b, scale in pairs.values()), strict=True)
        if self.dropout and self.training:
            low = torch.cat([product(self.drop(x), matrix) for matrix in a], -1)
        else:
            low = product(x, torch.cat(a, -2))
        return product(self._exchange(low), self.joined(dict(zip(pairs, b, strict=True))))

    def pairs(self) -> dict[str, tuple[Tensor, Tensor, float | Tensor]]:
        """(A, B, factor) of each pair, by the last part of its Hugging Face name."""
        shorts = [name[:-2] for name, _ in self.named_parameters() if name.endswith("_A")]
        return {s: (getattr(self, f"{s}_A"), getattr(self, f"{s}_B"), self._scale(s)) for s in shorts}

    def _scale(self, short: str) -> float | Tensor:
        """[E, 1, 1] where experts differ; made once, since it comes from the host."""
        scales = [shares[short].scale for shares in self.shares if short in shares]
        if len(set(scales)) == 1:
            return scales[0]
        if short not in self._scales:
            values = [shares[short].scale if short in shares else 1.0 for shares in self.shares]
            device = getattr(self, f"{short}_B").device
            self._scales[short] = torch.tensor(values, device=device).view(-1, 1, 1)
        return self._scales[short]

    def joined(self, b: Mapping[str, Tensor]) -> Tensor:
        """One B [..., out, sum of ranks] of several [..., rows, rank]: each in its rows and its columns, zeros elsewhere.

        One product with it costs less than a product, a scale and a rearrangement of its rows for every pair.
        """
        like = next(iter(b.values()))
        width = sum(matrix.shape[-1] for matrix in b.values())
        left = 0
        blocks = []
        for short, rows in self.blocks:
            if short in b:
                rank = b[short].shape[-1]
                blocks.append(F.pad(b[short], (left, width - left - rank)))
                left += rank
            else:
                blocks.append(like.new_zeros(*like.shape[:-2], rows, width))
        whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -2)
        return whole if self.order is None else whole.index_select(-2, self.order)

    def summed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of an expert, whose gradients ranks add up where they hold them whole."""
        if not self.expert or self.size == 1:
            return a, b
        # The dispatcher adds up activations and their gradients over these ranks, so only weights are left.
        whole = partial(copy_to_tensor_model_parallel_region, group=self.group)
        return a if self.divides_columns else whole(a), b if self.divides_rows else whole(b)

    def drop(self, x: Tensor) -> Tensor:
        """Ranks with the same input drop the same numbers."""
        if not self.dropout or not self.training:
            return x
        differs = self.size > 1 and (self.divides_columns or (self.sequence_parallel and not self.expert))
        with get_cuda_rng_tracker().fork() if differs else nullcontext():
            return F.dropout(x, self.dropout)

    def _exchange(self, low: Tensor) -> Tensor:
        """A x [..., r] as B needs it, with the gradient as A needs it."""
        if self.size == 1 or self.expert or not (self.divides_rows or self.divides_columns):
            return low
        if self.divides_rows:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(low, True, group=self.group)
            return copy_to_tensor_model_parallel_region(low, group=self.group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.group)
        return reduce_from_tensor_model_parallel_region(low, group=self.group)

    def shards(self) -> ShardedStateDict:
        """Parameter -> what it is of the global tensors that have its Hugging Face names, one for each expert."""
        found: ShardedStateDict = {}
        for name, parameter in self.named_parameters():
            short, letter = name[:-2], name[-1]
            held = [(place, shares[short]) for place, shares in enumerate(self.shares) if short in shares]
            first = held[0][1]
            shards = self._shards(first, letter, parameter[0] if self.grouped else parameter)
            if not self.grouped and len(shards) == 1:
                found[name] = shards[0]
                continue
            divide: Any = partial(self._divide, held, letter) if self.grouped else partial(self._cut, first, letter)
            join: Any = partial(self._stack, held, 0 if letter == "A" else 1) if self.grouped else torch.cat
            found[name] = ShardedTensorFactory(first.key(letter), parameter, divide, join, shards[0].replica_id)
        return found

    def _shards(self, share: PairShard, letter: str, data: Tensor, prefix: str = "") -> list[ShardedTensor]:
        """One for each run of rows or columns that this rank has of a matrix."""
        by_dp = mpu.get_expert_data_parallel_rank() if self.expert else mpu.get_data_parallel_rank(True)
        dim, size, spans = (1, share.shape[1], (share.columns,)) if letter == "A" else (0, share.shape[0], share.rows)
        whole = sum(stop - start for start, stop in spans) == size
        replica = (0, self.group.rank() if whole else 0, by_dp)
        shards, done = [], 0
        for start, stop in spans:
            # The optimizer knows a parameter by the tensor itself, not by a view of it.
            part = data if len(spans) == 1 else data.narrow(dim, done, stop - start)
            shard = ShardedTensor.from_rank_offsets(prefix + share.key(letter), part, replica_id=replica)
            sizes = tuple(size if d == dim else n for d, n in enumerate(part.shape))
            offset = tuple(start if d == dim else 0 for d in range(part.dim()))
            regular = not start % (stop - start) and not size % (stop - start) and len(spans) == 1
            grid = tuple(n // m for n, m in zip(sizes, part.shape, strict=True)) if regular else None
            shards.append(replace(shard, global_shape=sizes, global_offset=offset, axis_fragmentations=grid))
            done += stop - start
        return shards

    def _cut(self, share: PairShard, letter: str, key: str, data: Tensor, *_: object) -> list[ShardedTensor]:
        """The runs of one matrix. key: its own, after a prefix if `data` is an optimizer's."""
        return self._shards(share, letter, data, key.removesuffix(share.key(letter)))

    def _divide(
        self, held: Sequence[tuple[int, PairShard]], letter: str, key: str, data: Tensor, *_: object
    ) -> list[ShardedTensor]:
        """Each expert's matrix in its own rank. key: as of _cut, of the first one."""
        prefix, dim = key.removesuffix(held[0][1].key(letter)), 0 if letter == "A" else 1
        return [
            shard
            for place, share in held
            for shard in self._shards(share, letter, data[place].narrow(dim, 0, share.rank).contiguous(), prefix)
        ]

    def _stack(self, held: Sequence[tuple[int, PairShard]], dim: int, parts: Sequence[Tensor]) -> Tensor:
        """The other way round."""
        found: list[Tensor | None] = [None] * len(self.shares)
        for (place, _), part in zip(held, parts, strict=True):
            found[place] = part
        return _stacked(found, dim)


@torch.no_grad()
def _stacked(matrices: Sequence[Tensor | None], dim: int) -> Tensor:
    """[experts, ...], zeros where an expert has none. dim: that of the rank, which is filled up to whole 16 bytes."""
    like = max((m for m in matrices if m is not None), key=lambda m: m.shape[dim])
    rank = -(-like.shape[dim] // 8) * 8
    whole = like.new_zeros(len(matrices), *(rank if d == dim else size for d, size in enumerate(like.shape)))
    for place, matrix in zip(whole, matrices, strict=True):
        if matrix is not None:
            place.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return whole


Held = list[tuple[str, Segment]]  # of Hugging Face weights


def _held(linear: LiveLinear) -> Held:
    """The rows of Hugging Face weights of which the layer's rows on this rank consist, in their order."""
    return [
        (entry.hf[segment.source], segment)
        for entry, offset, shape in linear.shards
        for segment in clip(entry.segments, offset[0], offset[0] + shape[0])
    ]


def _shares(linear: LiveLinear, plan: LoraPlan) -> dict[str, PairShard]:
    """Last part of the Hugging Face name -> this rank's part of the pair."""
    _, offset, shape = linear.shards[0]
    columns = (offset[1], offset[1] + shape[1])
    held = _held(linear)
    shapes = {name: shape for entry in linear.entries for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
    shares = [
        _share(name.removesuffix(".weight"), shapes[name], held, columns, plan)
        for name in linear.names if name.removesuffix(".weight") in plan.modules
    ]  # fmt: skip
    return {share.short: share for share in shares}


def _blocks(names: Sequence[str], held: Held) -> tuple[list[tuple[str, int]], list[int]]:
    """((last part of the name, rows) of each Hugging Face weight held here, where each held row is among their rows)."""
    blocks, total = [], 0
    place = dict[tuple[str, Segment], int]()
    for name in names:
        before = total
        for segment in sorted((s for n, s in held if n == name), key=lambda s: s.start):
            place[name, segment] = total
            total += segment.size
        if total > before:
            blocks.append((name.removesuffix(".weight").rpartition(".")[2], total - before))
    return blocks, [place[name, segment] + row for name, segment in held for row in range(segment.size)]


def _share(module: str, shape: tuple[int, ...], held: Held, columns: tuple[int, int], plan: LoraPlan) -> PairShard:
    mine = [(segment.start, segment.start + segment.size) for name, segment in held if name == f"{module}.weight"]
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(mine):
        spans[-1:] = [(spans[-1][0], stop)] if spans and spans[-1][1] == start else [*spans[-1:], (start, stop)]
    count = sum(stop - start for start, stop in mine)
    if not count or shape[0] % count:
        raise UsageError(
            f"--tensor_model_parallel_size: its ranks would hold unequal parts of {module}, on which LoRA is not "
            "possible; take at most as many as there are key/value heads"
        )
    return PairShard(module, shape, *plan.modules[module], tuple(spans), columns)


class Adapters(torch.nn.Module):
    """All pairs of one model chunk on this rank, by the path of the layer they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def attach(self, linear: LiveLinear, lora: Lora) -> None:
        """linear: of a layer with several experts, any of them."""
        self.add_module(linear.path.replace(".", "/"), lora)

        def add(layer: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, object]) -> object:
            if not self.enabled:
                return output
            x, ends = inputs[0], None
            if lora.grouped:  # a second input says how many rows each expert has
                ends = torch.as_tensor(inputs[1], device=x.device).cumsum(0, dtype=torch.int32)
            if getattr(layer, "layer_norm_weight", None) is not None:  # Transformer Engine's norm and linear in one
                x = rms_norm(x, layer.layer_norm_weight, layer.eps, layer.zero_centered_gamma)
            return output[0] + lora(x, ends), output[1]

        # Before hooks that exchange outputs between ranks.
        linear.module.register_forward_hook(add, prepend=True)

    def sharded_state_dict(self, *_: object, **__: object) -> ShardedStateDict:
        """Nothing: the model's own state is that of the base."""
        return {}

    def shards(self) -> ShardedStateDict:
        """This rank's part of the adapters, for `state_dict` names; keys are Hugging Face names."""
        return {
            f"{name}.{parameter}": shard
            for name, lora in self.named_children()
            for parameter, shard in lora.shards().items()  # type: ignore[operator]
        }


def add_adapters(models: Sequence[MegatronModule], origin: Checkpoint, plan: LoraPlan, dropout: float) -> None:
    """Freeze the model chunks and give them adapters, as their child `adapters`. Before Float16Module and DDP."""
    for model in models:
        model.requires_grad_(False)
        adapters = Adapters()
        adapters.whole = WholeWeights(model, origin, plan.whole)
        layers: dict[str, list[LiveLinear]] = {}
        for linear in live_linears(model, origin.bound):
            layers.setdefault(linear.path, []).append(linear)
        for linears in layers.values():
            linears.sort(key=lambda linear: linear.group or 0)
            if any(name.removesuffix(".weight") in plan.modules for one in linears for name in one.names):
                adapters.attach(linears[0], Lora(linears, plan, dropout, model.config))
        add_rows(model, adapters, plan.rows)
        model.adapters = adapters
        let_gradients_through(model)


def prepare_lora(models: Sequence[MegatronModule], origin: Checkpoint, args: MegatronSftArguments) -> LoraPlan:
    """Freeze the model chunks and add the adapters that `args` ask for: new ones, or those of `--adapters`.

    Returns: the plan; its `values` are used up.
    """
    given, bound = args.adapters or args.mcore_adapter, origin.bound
    new = nullcontext(with_new_rows(plan_lora(bound, args), origin))
    with read_lora(bound, args) if given else new as plan:
        add_adapters(models, origin, plan, args.lora_dropout)
        return plan


def load_given(models: Sequence[MegatronModule], plan: LoraPlan) -> None:
    """What `--adapters` has in the place of the model's own weights, after these were loaded."""
    for model in models if plan.given else ():
        unwrap(model).adapters.whole.load(plan.given)


@contextmanager
def adapters_disabled(models: Sequence[MegatronModule]) -> Iterator[None]:
    """The models without their adapters inside the block: what a preference reference is, for one."""
    found = [unwrap(model).adapters for model in models]
    before = [adapters.enabled for adapters in found]
    try:
        with ExitStack() as stack:
            for adapters in found:
                adapters.enabled = False
                stack.enter_context(adapters.whole.originals())
            yield
    finally:
        for adapters, enabled in zip(found, before, strict=True):
            adapters.enabled = enabled
