"""Core attention of the local spec against plain formulas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.megatron.context import places
from swiftlite.megatron.model.blocks import attention as block
from swiftlite.megatron.model.blocks.attention import SdpaAttention

CONFIG: dict[str, Any] = {
    "sequence_parallel": True, "context_parallel_size": 1, "tensor_model_parallel_size": 1, "num_attention_heads": 4,
    "kv_channels": 8, "attention_dropout": 0.0, "window_size": None, "window_attn_skip_freq": None,
    "softmax_type": "vanilla", "perform_initialization": False, "params_dtype": torch.float32,
}  # fmt: skip


def attention(number: int = 1, **kwargs: Any) -> SdpaAttention:
    config = SimpleNamespace(**{**CONFIG, **kwargs.pop("config", {})})
    return SdpaAttention(config, number, None, "self", **kwargs)


def by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float = 8**-0.5,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    cap: float | None = None,
) -> torch.Tensor:
    """Causal attention written out. query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N * Dv]."""
    repeat, length = query.shape[2] // key.shape[2], len(query)
    key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    for i in range(length):
        for j in range(length):
            if j > i or (window is not None and i - j >= window):
                scores[:, :, i, j] = float("-inf")
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp().view(1, -1, 1, 1)
    return torch.einsum("bnqk,kbnd->qbnd", weights / total, value).flatten(2)


@pytest.mark.parametrize(("groups", "value_width"), [(4, 8), (2, 8), (1, 8), (4, 12)])
def test_core_attention(groups: int, value_width: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(17, 3, 4, 8), torch.randn(17, 3, groups, 8)
    value = torch.randn(17, 3, groups, value_width)
    torch.testing.assert_close(attention()(query, key, value), by_hand(query, key, value))


def test_scale_of_the_caller_comes_first() -> None:
    query, key, value = (torch.randn(5, 1, 2, 8) for _ in range(3))
    out = attention(softmax_scale=0.3, k_channels=8, v_channels=8)(query, key, value)
    torch.testing.assert_close(out, by_hand(query, key, value, 0.3))


@pytest.mark.parametrize("window", [None, 1, 5, 23, 40])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("chunk", [8, 1024])
def test_windows_sinks_and_caps(
    window: int | None, with_sinks: bool, cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, also where the scores are computed in chunks."""
    monkeypatch.setattr(block, "CHUNK", chunk)
    torch.manual_seed(0)
    config: dict[str, Any] = {"softmax_type": "learnable"} if with_sinks else {}
    mine = attention(config=config | ({"window_size": (window - 1, 0)} if window else {}))
    mine.cap = cap
    inputs = [torch.randn(23, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    if mine.softmax_offset is not None:
        inputs.append(mine.softmax_offset)
        torch.nn.init.normal_(mine.softmax_offset)
    expected = by_hand(*inputs[:3], window=window, sinks=mine.softmax_offset, cap=cap)
    found, ahead = mine(*inputs[:3]), torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    for mine_, theirs in zip(
        torch.autograd.grad(found, inputs, ahead), torch.autograd.grad(expected, inputs, ahead), strict=True
    ):
        torch.testing.assert_close(mine_, theirs)


def test_a_pattern_says_which_layers_have_a_window() -> None:
    config = {"window_size": (3, 0), "window_attn_skip_freq": [1, 0, 1]}
    assert [attention(n, config=config).window for n in (1, 2, 3)] == [4, None, 4]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_samples_do_not_see_each_other(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(12, heads, 8) for heads in (4, 2, 2))
    packed = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 5, 5, 11]))  # an empty sample, padding behind
    mine = attention(config={"window_size": (window - 1, 0)} if window else {})
    out = mine(query, key, value, packed_seq_params=packed)
    for start, end in ((0, 5), (5, 11)):
        alone = by_hand(*(x[start:end].unsqueeze(1) for x in (query, key, value)), window=window)
        torch.testing.assert_close(out[start:end], alone.squeeze(1))
    changed = key.clone()
    changed[2] += 1
    again = mine(query, changed, value, packed_seq_params=packed)
    assert torch.equal(again[5:11], out[5:11])
    assert not torch.equal(again[:5], out[:5])


def test_one_mask_is_kept_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "_masks", {})
    cpu = torch.device("cpu")
    longest = block.causal_mask(9, 4, cpu)
    assert block.causal_mask(5, 4, cpu).data_ptr() == longest.data_ptr()
    assert [int(row.sum()) for row in block.causal_mask(5, 4, cpu)] == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_of_context_parallelism(size: int) -> None:
    """Each rank has a piece of the front and one of the end of every sample; together they have all tokens once."""
    bounds = torch.tensor([0, 16, 16, 24])
    parts = [places(24, bounds, size, rank).tolist() for rank in range(size)]
    assert sorted(sum(parts, [])) == list(range(24))
    if size == 2:
        assert parts[0] == [0, 1, 2, 3, 12, 13, 14, 15, 16, 17, 22, 23]
