"""A rank's experts as one weight [E, out, in] a projection, on torch's grouped products.

How many tokens an expert gets stays on the device: no copy to the host, so nothing waits and all can be captured in a
CUDA graph. Weights have the same names on disk as megatron-core's experts.
Shapes: E experts of this rank, T rows sorted by expert, I width of an expert on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend
from swiftlite.megatron.model.layers import Offsets
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.types import Settings


class GroupedLinear(torch.nn.Module):
    """One linear layer of all experts. Under expert tensor parallelism dimension `divided` of [out, in] is cut."""

    def __init__(
        self,
        experts: int,
        shape: tuple[int, int],
        divided: int,
        config: TransformerConfig,
        groups: ProcessGroupCollection,
        init: Callable[[Tensor], object],
    ) -> None:
        super().__init__()
        self.experts, self.divided = experts, divided
        self.gated = divided == 0 and config.gated_linear_unit
        self.accumulates = False  # True: the weight's gradient goes to its `main_grad` within the product
        self.ep_group, self.tp_group = groups.ep, groups.expt_tp
        self.dp_group = groups.expt_dp
        local = [size // self.tp_group.size() if dim == divided else size for dim, size in enumerate(shape)]
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(experts, *local, dtype=config.params_dtype, device=device))
        weight: Any = self.weight
        weight.allreduce = config.expert_model_parallel_size == 1  # False: summed over the experts' own ranks
        set_tensor_model_parallel_attributes(weight, True, divided + 1, 1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()), torch.no_grad():
                for expert in self.weight:
                    init(expert)

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, None]:
        """x [T, in], counts [E] rows of each expert, on x's device -> [T, out]. Rows behind the last expert's are undefined.

        Returns: as megatron-core's linear layers, with no bias.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        if self.accumulates and torch.is_grad_enabled():
            from swiftlite.megatron.model.grouped_wgrad import GroupedProduct

            return GroupedProduct.apply(x, self.weight, ends), None
        return F.grouped_mm(x, self.weight.transpose(1, 2), offs=ends), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Settings | None = None
    ) -> ShardedStateDict:
        """One shard an expert, two for gate and up, under the name that a linear layer of a single expert has."""
        factory = ShardedTensorFactory(
            f"{prefix}weight",
            self.weight,
            partial(self._shards, sharded_offsets),
            self._whole,
            (0, 0, self.dp_group.rank()),
        )
        return {f"{prefix}weight": factory}

    def _shards(
        self, offsets: Offsets, key: str, weight: Tensor, replica_id: tuple[int, ...], _: object = None
    ) -> list[ShardedTensor]:
        total, first = self.ep_group.size() * self.experts, self.ep_group.rank() * self.experts
        rank = self.tp_group.rank()
        size = self.tp_group.size()
        lead = len(offsets) + 1
        shards = []
        for place, expert in enumerate(weight):
            parts = expert.chunk(2) if self.gated else (expert,)
            for number, part in enumerate(parts):
                cut = (lead + self.divided, rank + number * size, size * len(parts))
                shards.append(
                    ShardedTensor.from_rank_offsets(
                        key,
                        part,
                        *offsets,
                        (len(offsets), first + place, total),
                        cut,
                        replica_id=replica_id,
                        prepend_axis_num=lead,
                    )  # fmt: skip
                )
        return shards

    def _whole(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).view(self.experts, -1, parts[0].shape[-1])


class GroupedExperts(MegatronModule):  # type: ignore[misc]
    """Experts of a MoELayer, in the place of SequentialMLP and TEGroupedMLP."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size
        rows = 2 * width if config.gated_linear_unit else width
        layer = partial(GroupedLinear, num_local_experts, config=config, groups=pg_collection)
        self.linear_fc1 = layer((rows, hidden), 0, init=config.init_method)
        self.linear_fc2 = layer((hidden, width), 1, init=config.output_layer_init_method)

    def forward(self, x: Tensor, counts: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """x [T, H] sorted by expert, counts [E], probs [T] the router's weight of each row -> ([T, H], no bias)."""
        counts = counts.to(x.device)
        inner, _ = self.linear_fc1(x, counts)
        output, _ = self.linear_fc2(self._activate(inner, probs.unsqueeze(-1)), counts)
        return output, None

    def _activate(self, inner: Tensor, probs: Tensor) -> Tensor:
        """Activation times the router's weight; fused as megatron-core's own experts do."""
        config = self.config
        if config.gated_linear_unit and config.bias_activation_fusion:
            return weighted_bias_swiglu_impl(inner, None, probs)  # type: ignore[no-any-return]
        if config.gated_linear_unit:
            gate, up = inner.chunk(2, -1)
            return (config.activation_func(gate) * up * probs).to(inner.dtype)
        return (config.activation_func(inner) * probs).to(inner.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Settings | None = None
    ) -> ShardedStateDict:
        """Keys on disk are those of megatron-core's experts: `experts.` once more before the layer."""
        found = {}
        for name, layer in self.named_children():
            for factory in layer.sharded_state_dict("", sharded_offsets, metadata).values():
                factory.key = f"{prefix}experts.{name}.{factory.key}"
                found[f"{prefix}{name}.weight"] = factory
        return found

    def backward_dw(self) -> None:
        """Part of megatron-core's interface; weight gradients are never postponed here."""


class LocalDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Sorts tokens by expert where one rank holds all experts: nothing travels, nothing is sorted again, nothing waits."""

    def token_dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return tokens, probs

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tokens, self.tokens_per_expert, probs

    def combine_preprocess(self, tokens: Tensor) -> Tensor:
        return tokens

    def token_combine(self, tokens: Tensor, *_: object, **__: object) -> Tensor:
        return tokens

    def _maybe_dtoh_and_synchronize(self, point: str, counts: Tensor | None = None) -> Tensor | None:
        return counts


def implementation(args: MegatronArguments, config: TransformerConfig) -> str:
    """Whose products compute the experts: 'torch', 'te' (Transformer Engine's) or 'one by one'.

    Raises: ConfigError if --moe_grouped_impl asks for what cannot compute this model or is not there.
    """
    found, asked = backend.setup(), getattr(args, "moe_grouped_impl", None)
    usual = "te" if found.spec == "te" and config.moe_grouped_gemm else "one by one"
    lacks = config.add_bias_linear or getattr(config, "fp8", None) or "moe_act" in (config.recompute_modules or ())
    lacks = lacks or config.activation_func is not F.silu or config.moe_apply_probs_on_input
    lacks = lacks or {"moe_act", "expert_fc1"} & set(config.offload_modules or ())
    if asked == "torch" and lacks:
        raise ConfigError(
            "--moe_grouped_impl torch: has neither biases nor another gate than SiLU nor scores on inputs nor fp8 nor "
            "recomputation of moe_act; take te"
        )
    if asked == "te" and usual != "te":
        raise ConfigError("--moe_grouped_impl te: needs a GPU with Transformer Engine and --moe_grouped_gemm true")
    if asked is not None:
        return str(asked)
    has_kernel = found.is_cuda and torch.cuda.get_device_capability() >= (9, 0) and config.bf16
    return "torch" if has_kernel and not lacks and args.moe_grouped_gemm is not False else usual


def replacements(args: MegatronArguments, config: TransformerConfig) -> Mapping[type, type]:
    """Classes of a layer spec -> those that compute the experts of this model."""
    if not config.num_moe_experts or implementation(args, config) != "torch":
        return {}
    return {TEGroupedMLP: GroupedExperts, SequentialMLP: GroupedExperts}


class GatheringDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Each rank gathers the tokens of all ranks that share the experts and computes with its own experts.

    All ranks must have equally many tokens. Sizes are known beforehand then, so nothing waits for the host; room is made
    for the case that all tokens choose this rank's experts.
    """

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.hidden_shape, self.routing_map = tokens.shape, routing_map
        return tokens.view(-1, tokens.shape[-1]), probs

    def token_dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            chosen = gather_from_sequence_parallel_region(self.routing_map.to(torch.uint8), group=self.ep_group).bool()
        mine = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        self.routing_map = chosen[:, mine].contiguous()
        probs = gather_from_sequence_parallel_region(probs, group=self.ep_group)[:, mine].contiguous()
        return gather_from_sequence_parallel_region(tokens, group=self.ep_group), probs

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.hidden_shape_before_permute = tokens.shape
        counts, fused = self.routing_map.sum(0), self.config.moe_permute_fusion
        most = len(tokens) * min(self.config.moe_router_topk, self.num_local_experts)
        # The unfused form fills all rows that it makes with tokens, also those that nobody chose.
        rows = most if fused else int(counts.sum())
        tokens, probs, self.reversed_local_input_permutation_mapping = permute(
            tokens, self.routing_map, probs=probs, num_out_tokens=rows, fused=fused
        )[:3]
        return tokens, counts, probs

    def combine_preprocess(self, tokens: Tensor) -> Tensor:
        return unpermute(  # type: ignore[no-any-return]
            tokens, self.reversed_local_input_permutation_mapping, restore_shape=self.hidden_shape_before_permute,
            routing_map=self.routing_map, fused=self.config.moe_permute_fusion,
        )  # fmt: skip

    def token_combine(self, tokens: Tensor, *_: object, **__: object) -> Tensor:
        return reduce_scatter_to_sequence_parallel_region(tokens, group=self.ep_group)  # type: ignore[no-any-return]

    def combine_postprocess(self, tokens: Tensor) -> Tensor:
        return tokens.view(self.hidden_shape)


def _dispatcher(config: TransformerConfig) -> type | None:
    """What exchanges tokens of GroupedExperts without waiting for the host; None where megatron-core's own has to."""
    plain = config.moe_token_dispatcher_type == "alltoall" and not config.moe_shared_expert_overlap
    if not plain or config.moe_expert_capacity_factor is not None or config.expert_tensor_parallel_size > 1:
        return None
    # Gathering makes room for the tokens of all ranks: twice what is needed with two of them (measured: 1.7x one GPU), eight
    # times with eight.
    return {1: LocalDispatcher, 2: GatheringDispatcher}.get(config.expert_model_parallel_size)


def gathers(args: MegatronArguments, config: TransformerConfig) -> bool:
    """True if ranks that share experts gather each other's tokens, so that all must have equally many."""
    grouped = config.num_moe_experts and implementation(args, config) == "torch"
    return bool(grouped) and _dispatcher(config) is GatheringDispatcher


def keep_counts_on_device(model: torch.nn.Module) -> None:
    """Give layers with GroupedExperts a dispatcher that does not wait for the host, where there is one."""
    for layer in model.modules():
        if isinstance(layer, MoELayer) and isinstance(layer.experts, GroupedExperts):
            kind: Any = _dispatcher(layer.config)
            old = layer.token_dispatcher
            if kind is not None:
                layer.token_dispatcher = kind.__new__(kind)
                vars(layer.token_dispatcher).update(vars(old))


def counts_stay_on_device(models: Sequence[MegatronModule]) -> bool:
    """True if no layer with experts waits for the host in a pass."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, MoELayer)]
    return all(isinstance(layer.token_dispatcher, LocalDispatcher | GatheringDispatcher) for layer in layers)
