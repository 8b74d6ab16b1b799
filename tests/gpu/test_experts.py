"""Grouped experts and gradients that go into fp32 buffers on a GPU, compared to plain products in higher precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.blocks.router import TopKRouter
from swiftlite.megatron.model.provider import build_models
from tests.gpu.test_te import arguments, config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("counts", [[300, 0, 1, 700, 65], [0, 0, 0, 1066, 0], [1066, 0, 0, 0, 0]])
def test_grouped_weight_gradient(counts: list[int]) -> None:
    """Added to what is there; experts without a token and rows behind the last expert's change nothing."""
    from swiftlite.megatron.model.grouped_wgrad import add_grouped_products

    ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
    rows, out, into = int(ends[-1]), 384, 256
    gradient, x = (torch.randn(rows + 50, size, device="cuda").bfloat16() for size in (out, into))
    gradient[rows:], x[rows:] = float("nan"), float("nan")
    total = torch.randn(len(counts), out, into, device="cuda")
    wanted, start = total.double(), 0
    for expert, count in enumerate(counts):
        span = slice(start, start + count)
        wanted[expert] += gradient[span].double().T @ x[span].double()
        start += count
    add_grouped_products(gradient, x, ends, total)
    assert (total - wanted).norm() <= 1e-4 * wanted.norm()


def test_gradients_of_grouped_products() -> None:
    """torch's own grouped product forward and backward, with experts that get no token."""
    counts = torch.tensor([300, 0, 1, 700, 65], device="cuda")
    rows = int(counts.sum())
    x = torch.randn(rows, 256, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(5, 384, 256, device="cuda").bfloat16().requires_grad_()
    ends = counts.cumsum(0, dtype=torch.int32)
    found = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    gradient = torch.randn_like(found)
    mine = torch.autograd.grad(found, (x, weight), gradient)
    parts = [part @ w.double().T for part, w in zip(x.double().split(counts.tolist()), weight, strict=True)]
    wanted = torch.autograd.grad(torch.cat(parts), (x, weight), gradient.double())
    for a, b in zip(mine, wanted, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
    assert not mine[1][1].any()


@pytest.mark.parametrize("zero_centred", [False, True])
def test_compiled_norm(zero_centred: bool) -> None:
    from types import SimpleNamespace

    from swiftlite.megatron.model.layers import CompiledRMSNorm

    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=zero_centred, sequence_parallel=False
    )
    norm = CompiledRMSNorm(config, 128, eps=1e-6).cuda().bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(700, 2, 8, 128, device="cuda").bfloat16().requires_grad_()
    gradient = torch.randn_like(x)
    mine = torch.autograd.grad(norm(x), (x, norm.weight), gradient)
    wide = x.double()
    wanted = torch.nn.functional.rms_norm(wide, (128,), norm.weight.double() + zero_centred, 1e-6)
    assert (norm(x) - wanted).norm() <= 5e-3 * wanted.norm()
    trained = norm(x)
    with torch.no_grad():
        assert torch.equal(norm(x), trained)
    for a, b in zip(mine, torch.autograd.grad(wanted, (x, norm.weight), gradient.double()), strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()

    # Of keys, which are a part of all queries, keys and values, they alone are kept, with the same results.
    keys = torch.cat([x, x, x], dim=-1).detach().requires_grad_()[..., 128:256]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        assert torch.equal(norm(keys), trained)
    assert sum(saved.untyped_storage().nbytes() for saved in kept) == x.nbytes + norm.weight.nbytes


@pytest.mark.parametrize("case", ["glm4_5:default", "qwen3_moe:default", "deepseek_r1:default", "moonlight:default"])
def test_fused_router(case: str, tmp_path: Path) -> None:
    """Transformer Engine's choice of experts is megatron-core's, with its weights and their gradients."""
    (tmp_path / "config.json").write_text(json.dumps(config(case)))
    with parallel_groups(args := arguments(tmp_path, "bfloat16")):
        router = next(m for m in build_models(args)[0].modules() if isinstance(m, TopKRouter))
        assert router.config.moe_router_fusion
        if router.expert_bias is not None:
            router.expert_bias = torch.randn_like(router.expert_bias, dtype=torch.float32).cuda() / 4
        logits = torch.randn(3000, router.config.num_moe_experts, device="cuda", requires_grad=True)
        slope, found = torch.randn_like(logits), []
        for router.config.moe_router_fusion in (True, False):
            probs, chosen = router.route(logits)
            found.append((chosen, probs, *torch.autograd.grad(probs, logits, slope)))
    assert torch.equal(found[0][0], found[1][0])
    for mine, plain in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
