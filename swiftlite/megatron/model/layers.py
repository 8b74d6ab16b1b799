"""Layers that megatron-core's local spec lacks, and weight gradients that are added within products."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from swiftlite.megatron import backend
from swiftlite.utils.errors import ConfigError

Offsets = tuple[tuple[int, int, int], ...]  # of sharded state dicts: (axis, index, number of pieces)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism: its weight is marked, so its gradient is summed over TP ranks.

    A zero-centred one multiplies with 1 + weight, computed in fp32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        if config.normalization != "RMSNorm":
            raise ConfigError(f"normalization {config.normalization!r} is not supported by the local spec; RMSNorm is")
        super().__init__(hidden_size, eps=eps)
        self.zero_centered_gamma: bool = config.layernorm_zero_centered_gamma
        if self.zero_centered_gamma:
            torch.nn.init.zeros_(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, self.zero_centered_gamma)


def layer_norm(config: TransformerConfig) -> torch.nn.Module:
    """A norm of hidden states, of the kind that the model's other norms are."""
    if backend.setup().spec == "local":
        return RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm(config, config.hidden_size, config.layernorm_epsilon)  # type: ignore[no-any-return]


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """x [..., W] over its root mean square, times weight [W] or 1 + weight; in the dtype of x."""
    if zero_centered:
        return _rms_norm(x, weight, eps, zero_centered)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    wide = x.float()
    factor = weight.float() + 1 if zero_centered else weight.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor).to(x.dtype)


def _rms_norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    toward = gradient.float() * (weight.float() + 1 if zero_centered else weight.float())
    return (scale * (toward - normed * (toward * normed).mean(-1, keepdim=True))).to(x.dtype)


def _rms_norm_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (gradient.float() * normed).sum(0).to(weight.dtype)


class _CompiledNorm(torch.autograd.Function):
    """The same kernel at every call, with gradients or without: policy and reference of one model then agree to the bit.

    The compiler tunes each graph by its own timings, and two graphs may add in other orders.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        x = x.contiguous()  # keys are a part of all queries, keys and values, which need not be kept for them
        ctx.save_for_backward(x, weight)
        ctx.settings = eps, zero_centered
        return _compiled(_rms_norm)(_rows(x), weight, eps, zero_centered).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        eps, zero_centered = ctx.settings
        rows = (_rows(gradient), _rows(x))
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _compiled(_rms_norm_gradient)(*rows, weight, eps, zero_centered).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _compiled(_rms_norm_weight_gradient)(*rows, weight, eps)
        return of_x, of_weight, None, None


class CompiledRMSNorm(RMSNorm):
    """RMSNorm as one kernel forward and two backward, for narrow rows such as heads, of which there are many."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return _CompiledNorm.apply(x, self.weight, self.eps, self.zero_centered_gamma)  # type: ignore[no-any-return]


def _rows(x: Tensor) -> Tensor:
    """x [..., W] as [N, W], of which only N may vary in a compiled graph: one graph fits, whatever came before."""
    rows = x.reshape(-1, x.shape[-1])
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` compiled; torch's compiler takes a second to import."""
    return torch.compile(function, dynamic=False)


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Have linear layers add weight gradients to the fp32 buffers of DDP within their products. With Transformer Engine.

    megatron-core does the same if the model is built so, but asks for Apex then, and a model without DDP cannot run.
    """
    if backend.setup().spec != "te":
        return
    from megatron.core.tensor_parallel import layers
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add_product)
    module: Any
    for module in model.modules():
        weights = [p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")]
        if not weights or not all(hasattr(p, "main_grad") and p.main_grad.dtype == torch.float32 for p in weights):
            continue
        if isinstance(module, TransformerEngineBaseModule) and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif hasattr(module, "accumulates"):  # GroupedLinear, whose kernel would round fp32
            module.accumulates = weights[0].dtype != torch.float32
        elif isinstance(module, layers.VocabParallelEmbedding) and not module.deterministic_mode:
            layers.F = types.SimpleNamespace(embedding=_embedding)
        elif isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = True


class _Embedding(torch.autograd.Function):
    """A lookup whose gradient goes to the few rows that were read, in the weight's `main_grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        from transformer_engine.pytorch.module.base import get_dummy_wgrad

        ids, weight = ctx.saved_tensors
        weight.main_grad.index_add_(0, ids.flatten(), gradient.flatten(0, -2).float())
        weight.grad_added_to_main_grad = True
        return None, get_dummy_wgrad(list(weight.shape), weight.dtype)


def _embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """A tied weight gets a gradient from the output layer too, which is added as a whole. All models come here."""
    fp32 = getattr(getattr(weight, "main_grad", None), "dtype", None) == torch.float32
    apart = fp32 and not getattr(weight, "zero_out_wgrad", False)
    if apart and weight.requires_grad and torch.is_grad_enabled():
        return _Embedding.apply(ids, weight)  # type: ignore[no-any-return]
    return torch.nn.functional.embedding(ids, weight)


def _add_product(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
    """total [out, in] fp32 += gradients [T, out] transposed times inputs [T, in]."""
    if inputs.dtype == torch.float32:
        total.addmm_(gradients.t(), inputs)
        return
    torch.addmm(total, gradients.t(), inputs, out_dtype=torch.float32, out=total)
