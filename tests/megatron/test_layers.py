"""The local spec's layers against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.megatron.model.layers import RMSNorm, SdpaAttention
from swiftlite.utils.errors import ConfigError

CONFIG: dict[str, Any] = {
    "normalization": "RMSNorm", "layernorm_zero_centered_gamma": False, "sequence_parallel": True,
    "context_parallel_size": 1, "kv_channels": 8, "attention_dropout": 0.0, "window_size": None,
}  # fmt: skip


def attention(**kwargs: Any) -> SdpaAttention:
    config = SimpleNamespace(**{**CONFIG, **kwargs.pop("config", {})})
    return SdpaAttention(config, 1, None, "self", **kwargs)


def by_hand(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention written out. query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N * Dv]."""
    repeat = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize(("groups", "value_width"), [(4, 8), (2, 8), (1, 8), (4, 12)])
def test_core_attention(groups: int, value_width: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(17, 3, 4, 8), torch.randn(17, 3, groups, 8)
    value = torch.randn(17, 3, groups, value_width)
    torch.testing.assert_close(attention()(query, key, value), by_hand(query, key, value, 8**-0.5))


def test_scale_of_the_caller_comes_first() -> None:
    query, key, value = (torch.randn(5, 1, 2, 8) for _ in range(3))
    out = attention(softmax_scale=0.3, k_channels=8, v_channels=8)(query, key, value)
    torch.testing.assert_close(out, by_hand(query, key, value, 0.3))


def test_packed_samples_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5, 5, 11]))  # an empty sample, padding behind
    out = attention()(query, key, value, packed_seq_params=packed)
    for start, end in ((0, 5), (5, 11)):
        alone = by_hand(*(x[start:end].unsqueeze(1) for x in (query, key, value)), 8**-0.5)
        torch.testing.assert_close(out[start:end], alone.squeeze(1))
    changed = key.clone()
    changed[2] += 1
    again = attention()(query, changed, value, packed_seq_params=packed)
    assert torch.equal(again[5:11], out[5:11])
    assert not torch.equal(again[:5], out[:5])


@pytest.mark.parametrize(("field", "value"), [("window_size", (128, 0)), ("context_parallel_size", 2)])
def test_core_attention_refuses_what_it_does_not_compute(field: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        attention(config={field: value})


def test_rms_norm() -> None:
    norm = RMSNorm(SimpleNamespace(**CONFIG), 6, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
    x = torch.randn(4, 6)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.sequence_parallel is True
    with pytest.raises(ConfigError):
        RMSNorm(SimpleNamespace(**{**CONFIG, "normalization": "LayerNorm"}), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_centred_rms_norm_adds_one_in_fp32(dtype: torch.dtype) -> None:
    norm = RMSNorm(SimpleNamespace(**{**CONFIG, "layernorm_zero_centered_gamma": True}), 6, eps=1e-3).to(dtype)
    x = torch.randn(4, 6).to(dtype)
    plain = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(norm(x), plain.to(dtype), msg="it begins as the identity")
    with torch.no_grad():
        norm.weight.copy_(0.01 * torch.randn(6))  # most of it is lost in 1 + w rounded to bf16
    assert torch.equal(norm(x), (plain * (1 + norm.weight.float())).to(dtype))
