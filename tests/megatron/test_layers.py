"""The local spec's layers against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.megatron.model.layers import RMSNorm
from swiftlite.utils.errors import ConfigError

CONFIG: dict[str, Any] = {
    "normalization": "RMSNorm", "layernorm_zero_centered_gamma": False, "sequence_parallel": True,
}  # fmt: skip


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
