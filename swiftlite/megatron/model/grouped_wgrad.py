"""Weight gradients of grouped products, added to fp32 buffers inside the product. Triton; GPUs only.

torch's grouped product writes them in bf16, and adding those to the buffers afterwards moves ten bytes a number: a
seventh of a step of a model with many experts.
Shapes: E experts, T rows sorted by expert, M rows and N columns of an expert's weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.autotune(
    configs=[
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_T": 64}, num_warps=8, num_stages=4),
        triton.Config({"BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_T": 64}, num_warps=8, num_stages=3),
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 64}, num_warps=4, num_stages=4),
        triton.Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_T": 64}, num_warps=8, num_stages=4),
    ],
    key=["M", "N", "E"],
    restore_value=["total_ptr"],  # trying them out must not add to it
)
@triton.jit
def _add_kernel(
    gradient_ptr, input_ptr, ends_ptr, total_ptr, M, N, E,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One block of one expert's weight a program."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_n
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends_ptr + expert)
    if start < stop:
        m = (block // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = (block % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        t = tl.arange(0, BLOCK_T)
        gradients = gradient_ptr + (start + t).to(tl.int64)[:, None] * M + m[None, :]
        inputs = input_ptr + (start + t).to(tl.int64)[:, None] * N + n[None, :]
        added = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(start, stop, BLOCK_T):
            rows = (first + t)[:, None] < stop
            gradient = tl.load(gradients, mask=rows & (m[None, :] < M), other=0.0)
            value = tl.load(inputs, mask=rows & (n[None, :] < N), other=0.0)
            added = tl.dot(tl.trans(gradient), value, added)
            gradients += BLOCK_T * M
            inputs += BLOCK_T * N
        places = total_ptr + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
        inside = (m[:, None] < M) & (n[None, :] < N)
        tl.store(places, tl.load(places, mask=inside, other=0.0) + added, mask=inside)


def add_grouped_products(gradients: Tensor, inputs: Tensor, ends: Tensor, total: Tensor) -> None:
    """total [E, M, N] fp32 += gradients [rows of e, M] transposed times inputs [rows of e, N] for each expert e.

    gradients, inputs: [T, M] and [T, N], bf16. ends: int32 [E], where each expert's rows end; rows behind are not read.
    """
    experts, rows, columns = total.shape
    gradients, inputs = gradients.contiguous(), inputs.contiguous()

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        return (experts * triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(columns, meta["BLOCK_N"]),)

    _add_kernel[grid](gradients, inputs, ends, total, rows, columns, experts)


class GroupedProduct(torch.autograd.Function):
    """x [T, N], weight [E, M, N], ends [E] -> [T, M]; the weight's gradient goes to its `main_grad`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        from transformer_engine.pytorch.module.base import get_dummy_wgrad

        x, weight, ends = ctx.saved_tensors
        add_grouped_products(gradient, x, ends, weight.main_grad)
        weight.grad_added_to_main_grad = True  # DDP's hook wants some gradient, and adds none
        dummy = get_dummy_wgrad(list(weight.shape), weight.dtype)
        return torch.nn.functional.grouped_mm(gradient.contiguous(), weight, offs=ends), dummy, None
