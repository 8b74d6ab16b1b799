"""The gated delta rule and its convolution against what defines them, token by token, packed and not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftlite.megatron import backend

backend.setup()
from swiftlite.megatron.model.blocks.gated_delta_net import causal_conv, gated_delta_rule  # noqa: E402

LENGTHS = [1, 64, 0, 65, 3, 150]
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)


def by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One sample. As the paper writes it: the state decays, forgets what it says of the key, and learns the value."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    state = q.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1])
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        said = torch.einsum("bhd,bhde->bhe", k[:, t], state)
        learned = beta[:, t, :, None] * (v[:, t] - said)
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], learned)
        outs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outs, 1)


def inputs(batch: int, decay: float) -> list[Tensor]:
    torch.manual_seed(0)
    heads = (batch, int(BOUNDS[-1]), 3)
    found = [
        torch.randn(*heads, 5),
        torch.randn(*heads, 5),
        torch.randn(*heads, 7),
        -decay * torch.rand(heads),
        torch.rand(heads),
    ]
    return [x.double().requires_grad_() for x in found]


@pytest.mark.parametrize("decay", [5, 0.02])  # states that last for a few tokens, and for many chunks
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_are_the_recurrence(packed: bool, decay: float) -> None:
    made = inputs(1 if packed else 2, decay)
    out = gated_delta_rule(*made, BOUNDS if packed else None)  # type: ignore[call-arg]
    samples = [x.split(LENGTHS, 1) for x in made] if packed else [(x,) for x in made]
    expected = torch.cat([by_token(*one) for one in zip(*samples, strict=True) if one[0].shape[1]], 1)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    weight = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad((out * weight).sum(), made),
        torch.autograd.grad((expected * weight).sum(), made),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    assert not packed or not torch.allclose(out, gated_delta_rule(*made, None))  # type: ignore[call-arg]


def test_the_convolution_sees_its_own_sample() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(int(BOUNDS[-1]), 1, 6).double(), torch.randn(6, 1, 4).double()
    parts = [part.permute(1, 2, 0) for part in x.split(LENGTHS) if len(part)]
    apart = [F.silu(F.conv1d(p, weight, padding=3, groups=6)[..., : p.shape[-1]]).permute(2, 0, 1) for p in parts]
    torch.testing.assert_close(causal_conv(x, weight, BOUNDS), torch.cat(apart))
    whole = F.silu(F.conv1d(x.permute(1, 2, 0), weight, padding=3, groups=6)[..., : len(x)]).permute(2, 0, 1)
    torch.testing.assert_close(causal_conv(x, weight, None), whole)
    assert not torch.allclose(whole, torch.cat(apart))
