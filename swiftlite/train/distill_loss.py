"""How far a student's next-token distributions are from a teacher's; shared by both sides. Imports torch only.

N: positions, V: vocabulary, or this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Parts:
    """How ranks that hold parts of a vocabulary put them together, [N] each; by itself: one rank that holds all of it.

    total: the sum over ranks, whose gradient each of them has whole. shared: the same values, their gradients summed over
    ranks. largest: of all ranks.
    """

    total: Callable[[Tensor], Tensor] = _same
    shared: Callable[[Tensor], Tensor] = _same
    largest: Callable[[Tensor], Tensor] = _same


@dataclass(frozen=True)
class Divergence:
    """The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, equation 1), as trl computes it.

    beta: 0: KL(teacher || student), 1: KL(student || teacher), between: beta KL(teacher || m) + (1 - beta) KL(student || m)
    with the mixture m = beta teacher + (1 - beta) student. temperature: divides both models' logits.
    """

    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, student: Tensor, teacher: Tensor, parts: Parts | None = None) -> Tensor:
        """Divergences [N], fp32, of logits [N, V], with gradients into the student's."""
        parts = parts or Parts()
        s, t = (self._log_probs(logits, parts) for logits in (student, teacher.detach()))
        if self.beta == 0:
            return parts.total(_kl(t, s))
        if self.beta == 1:
            return parts.total(_kl(s, t))
        weight = torch.tensor(self.beta, device=s.device)
        mixture = torch.logaddexp(s + torch.log1p(-weight), t + torch.log(weight))
        return parts.total(self.beta * _kl(t, mixture) + (1 - self.beta) * _kl(s, mixture))

    def _log_probs(self, logits: Tensor, parts: Parts) -> Tensor:
        logits = logits.float() / self.temperature
        logits = logits - parts.largest(logits.detach().amax(-1))[:, None]
        return logits - parts.shared(parts.total(logits.exp().sum(-1)).log())[:, None]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum over the last axis of P (log P - log Q), from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
