"""Layers of linear attention (Qwen3-Next, Qwen3.5): gated delta nets instead of attention, by `linear_attention_freq`.

Weights have megatron-core's names and, on disk, its parts. Its own layer is not used: it has no pure torch form of packed
sequences, none of packed sequences at all before 0.18, and its output norm multiplies with 1 + weight where other norms
do, though this one's weight is plain.

Shapes: S sequence (packed: all samples), B batch, K key heads, V value heads of this rank, D and E their widths, N chunks
of C tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from packaging.version import Version
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron import backend
from swiftlite.megatron.context import gather, my_places, ranks, samples
from swiftlite.megatron.model.layers import Offsets, rms_norm
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json, Settings
from swiftlite.weights.shape import layer_pattern

CHUNK = 64
PARTS = ("query", "key", "value", "z", "beta", "alpha")  # of in_proj's rows, in this order on each rank

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class GatedDeltaNet(MegatronModule):  # type: ignore[misc]
    """Each value head keeps a state [D, E], which every token decays, corrects towards its value and reads.

    Under TP ranks divide the heads; samples that CP ranks share are gathered.
    """

    def __init__(self, config: TransformerConfig, submodules: Any, layer_number: int, **_: object) -> None:
        """submodules: those of attention, whose projections are the layers for these too."""
        super().__init__(config)
        self.layer_number = layer_number
        self.group = mpu.get_tensor_model_parallel_group()
        size = self.group.size()
        self.key_heads, self.value_heads = config.linear_num_key_heads // size, config.linear_num_value_heads // size
        keys, values = self.key_heads * config.linear_key_head_dim, self.value_heads * config.linear_value_head_dim
        self.sizes = [keys, keys, values, values, self.value_heads, self.value_heads]
        both = {"config": config, "bias": False, "is_expert": False, "tp_group": self.group}
        self.in_proj = submodules.linear_qkv(
            config.hidden_size, sum(self.sizes) * size, init_method=config.init_method, gather_output=False,
            skip_bias_add=False, tp_comm_buffer_name="fc1", **both,
        )  # fmt: skip
        place = {"device": backend.setup().device, "dtype": config.params_dtype}
        width = 2 * keys + values
        self.conv1d = torch.nn.Conv1d(
            width, width, config.linear_conv_kernel_dim, groups=width, bias=False, **place
        )  # fmt: skip
        self.dt_bias = torch.nn.Parameter(torch.ones(self.value_heads, **place))
        self.A_log = torch.nn.Parameter(torch.zeros(self.value_heads, **place))
        for divided in (self.conv1d.weight, self.dt_bias, self.A_log):
            set_tensor_model_parallel_attributes(divided, True, 0, 1)
        self.out_norm = torch.nn.RMSNorm(config.linear_value_head_dim, config.layernorm_epsilon, **place)
        self.out_proj = submodules.linear_proj(
            values * size, config.hidden_size, init_method=config.output_layer_init_method, input_is_parallel=True,
            skip_bias_add=True, tp_comm_buffer_name="fc2", **both,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> the same, and no bias. Padding stands after the real tokens, so no mask is read."""
        projected, _bias = self.in_proj(hidden_states)
        bounds = None if packed_seq_params is None else packed_seq_params.cu_seqlens_q
        (projected,) = gather(bounds, projected)
        out = self._mix(projected, bounds)
        if ranks() > 1:
            out = out[my_places(len(out), bounds, out.device)]
        return self.out_proj(out)  # type: ignore[no-any-return]

    def _mix(self, projected: Tensor, bounds: Tensor | None) -> Tensor:
        """Everything between the projections: [S, B, sum of sizes] -> [S, B, V E]."""
        if bounds is not None:  # what stands behind the last sample counts as one
            bounds = F.pad(bounds, (0, 1), value=len(projected))
        mixed, *rest = projected.split([sum(self.sizes[:3]), *self.sizes[3:]], -1)
        mixed = causal_conv(mixed, self.conv1d.weight, bounds)
        parts = dict(zip(PARTS, (*mixed.split(self.sizes[:3], -1), *rest), strict=True))
        g = -self.A_log.float().exp() * F.softplus(parts["alpha"].float() + self.dt_bias)
        counts = (self.key_heads, self.key_heads, self.value_heads)
        heads = [self._heads(parts[name], count) for name, count in zip(PARTS, counts, strict=False)]
        beta = parts["beta"].sigmoid()
        rule = kernel() or gated_delta_rule
        out = rule(heads[0], heads[1], heads[2], g.transpose(0, 1), beta.transpose(0, 1), bounds)
        # Every rank has some of the heads, so the weight's gradient is a sum over ranks.
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight, group=self.group)
        assert self.out_norm.eps is not None
        out = rms_norm(out, weight, self.out_norm.eps, zero_centered=False)
        gate = F.silu(self._heads(parts["z"], self.value_heads).float())
        return (out * gate).to(projected.dtype).flatten(2).transpose(0, 1).contiguous()

    def _heads(self, x: Tensor, count: int) -> Tensor:
        """[S, B, rows of `count` heads] -> [B, S, V, D or E]; value heads share key heads."""
        return x.transpose(0, 1).unflatten(-1, (count, -1)).repeat_interleave(self.value_heads // count, 2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: Settings | None = None
    ) -> Json:
        """As megatron-core's: in_proj.weight and conv1d.weight are divided into their parts."""
        groups = {"tp_group": self.group, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
        divided = {"dt_bias": self.dt_bias, "A_log": self.A_log, "conv1d.weight": self.conv1d.weight}
        own = {**divided, "out_norm.weight": self.out_norm.weight}
        axes = dict.fromkeys(divided, 0)
        state: Json = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, **groups)
        for name in ("in_proj", "out_proj"):
            module = getattr(self, name)
            state |= sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata or groups)
        for name, count in ((f"{prefix}in_proj.weight", 6), (f"{prefix}conv1d.weight", 3)):
            state[name] = _parts(state[name], self.sizes[:count])
        return state


def _parts(shard: ShardedTensor, sizes: Sequence[int]) -> ShardedTensorFactory:
    """What one rank's rows are of the tensors by the names PARTS."""

    def divide(key: str, data: Tensor, replica: object, *_: object) -> list[ShardedTensor]:
        whole = replace(shard, key=key, data=data, dtype=data.dtype, replica_id=replica)
        starts = accumulate(sizes, initial=0)
        return [
            replace(part, key=f"{key}.{name}")
            for name, start, size in zip(PARTS, starts, sizes, strict=False)
            for part in whole.narrow(0, start, size)
        ]

    return ShardedTensorFactory(shard.key, shard.data, divide, torch.cat, shard.replica_id)


def causal_conv(x: Tensor, weight: Tensor, bounds: Tensor | None) -> Tensor:
    """[S, B, width] -> the same: each channel's convolution over the tokens before and at its own, and SiLU.

    weight: [width, 1, tokens]. bounds: int [samples + 1], where samples begin and end; None: there is one.
    """
    gap, length = weight.shape[-1] - 1, len(x)
    if bounds is None:
        spread = F.pad(x, (0, 0, 0, 0, gap, 0))
    else:  # zeros before each sample
        place = torch.arange(length, device=x.device)
        place = place + gap * samples(place, bounds)
        spread = x.new_zeros(length + gap * len(bounds), *x.shape[1:]).index_copy(0, place + gap, x)
    out = F.silu(F.conv1d(spread.permute(1, 2, 0), weight, groups=len(weight))).permute(2, 0, 1)
    return out if bounds is None else out[place]


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, bounds: Tensor | None) -> Tensor:
    """The recurrence in torch, a chunk at a time, in fp32 at least.

    Args: q, k: [B, S, V, D]. v: [B, S, V, E]. g: [B, S, V], logarithms of the states' decay. beta: [B, S, V], shares of
        the correction. bounds: int [samples + 1], where samples begin and end; None: there is one.
    Returns: [B, S, V, E] in the dtype of v.
    """
    dtype, length = v.dtype, q.shape[1]

    def chunked(x: Tensor) -> Tensor:  # [B, S, V, ...] -> [B, V, N, C, ...]
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.transpose(1, 2).to(wide, memory_format=torch.contiguous_format)
        return F.pad(x, (0, 0) * (x.ndim - 3) + (0, -length % CHUNK)).unflatten(2, (-1, CHUNK))

    q, k, v, g, beta = (chunked(x) for x in (q, k, v, g, beta))
    # Queries and keys have length one; that and all other factors of tokens go to products of [C, C], which are smaller.
    q_scale, k_scale = _over_length(q) * q.shape[-1] ** -0.5, _over_length(k)
    decay = g.cumsum(-1)
    before, after = decay.exp(), (decay[..., -1:] - decay).exp()  # from the chunk's beginning, until its end
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).tril().exp().tril()  # from a token (column) to a later one
    if bounds is not None:  # nothing is left of other samples
        sample = samples(torch.arange(length, device=q.device), bounds)
        sample = F.pad(sample, (0, -length % CHUNK)).unflatten(0, (-1, CHUNK))
        last = sample[:, -1:]
        before, after = before * (sample == F.pad(last, (0, 0, 1, -1), value=-1)), after * (sample == last)
        between = between * (sample.unsqueeze(-1) == sample.unsqueeze(-2))
    between = between * k_scale.unsqueeze(-2)
    # What a token stores depends on what those before it in the chunk store: a triangular system.
    corrections = (k @ k.mT * between * (beta * k_scale).unsqueeze(-1)).tril(-1)
    one = torch.eye(CHUNK, dtype=k.dtype, device=k.device).expand_as(corrections)
    shares = torch.linalg.solve_triangular(corrections, one, upper=False, unitriangular=True) * beta.unsqueeze(-2)
    values, keys = shares @ v, shares * (before * k_scale).unsqueeze(-2) @ k
    storing = (k * (after * k_scale).unsqueeze(-1)).mT
    states = _States.apply(before[..., -1:, None], keys, values, storing)
    scores = q @ k.mT * between * q_scale.unsqueeze(-1)
    out = scores @ (values - keys @ states) + q @ states * (before * q_scale).unsqueeze(-1)
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2).to(dtype)


class _States(torch.autograd.Function):
    """The states before each chunk. What chunk n makes of a state is carry[n] @ state + added[n]: one product a chunk waits
    for the one before, in the backward pass too, and all else is of all chunks at once."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, keys: Tensor, values: Tensor, storing: Tensor) -> Tensor:
        """left: [B, V, N, 1, 1], keys: [B, V, N, C, D], values: [B, V, N, C, E], storing: [B, V, N, D, C] -> [.., D, E]."""
        carry, states = _carry(left, keys, storing), F.pad(storing @ values, (0, 0, 0, 0, 1, -1))
        for n in range(1, states.shape[2]):
            _add_product(states[:, :, n], carry[:, :, n - 1], states[:, :, n - 1])
        ctx.save_for_backward(left, keys, values, storing, states)
        return states

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        left, keys, values, storing, states = ctx.saved_tensors
        carry = _carry(left, keys, storing).mT
        after = F.pad(gradient, (0, 0, 0, 0, -1, 1))  # of the state that each chunk leaves
        for n in reversed(range(after.shape[2] - 1)):
            _add_product(after[:, :, n], carry[:, :, n + 1], after[:, :, n + 1])
        of_new = storing.mT @ after
        of_storing = after @ (values - keys @ states).mT
        return (after * states).sum((-2, -1), keepdim=True), -of_new @ states.mT, of_new, of_storing


def _carry(left: Tensor, keys: Tensor, storing: Tensor) -> Tensor:
    return torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device) * left - storing @ keys


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, of [B, V, ...], as one kernel."""
    wide, a, b = (x.view(-1, *x.shape[2:]) for x in (out, a, b))
    wide.baddbmm_(a, b)


def _over_length(x: Tensor) -> Tensor:
    """[..., D] -> [...], one over the vectors' lengths, as transformers computes them."""
    return torch.rsqrt(x.square().sum(-1) + 1e-6)


@functools.cache
def kernel() -> Rule | None:
    """flash-linear-attention's kernels for the rule, on a GPU where they are installed."""
    if not backend.setup().is_cuda:
        return None
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        get_logger().info("linear attention: torch; pip install flash-linear-attention is faster")
        return None
    triton = Version(metadata.version("triton"))
    if torch.cuda.get_device_capability()[0] == 9 and Version("3.4") <= triton < Version("3.7.1"):
        # It says so itself, but in the backward pass.
        get_logger().info(
            "linear attention: torch; on this GPU flash-linear-attention needs Triton 3.7.1, not %s", triton
        )
        return None
    get_logger().info("linear attention: flash-linear-attention %s", metadata.version("flash-linear-attention"))

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, bounds: Tensor | None) -> Tensor:
        settings: Json = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": None if bounds is None else bounds.long()}
        out, _ = chunk_gated_delta_rule(q.contiguous(), k.contiguous(), v.contiguous(), g, beta.to(v.dtype), **settings)
        return out  # type: ignore[no-any-return]

    return rule


def change_layer(layer: Any, args: MegatronArguments, index: int) -> None:
    model, parts = args.description, layer.submodules
    if layer_pattern(model.linear_attention_freq, model.num_layers)[index]:
        parts.self_attention = replace(parts.self_attention, module=GatedDeltaNet)
        names = parts.sharded_state_dict_keys_map
        if "input_layernorm." in names:  # as block_spec has it for attention
            names = {**names, "input_layernorm.": "self_attention.in_proj.layer_norm_"}
        parts.sharded_state_dict_keys_map = names
