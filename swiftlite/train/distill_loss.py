"""How far a student's next-token distributions are from a teacher's; shared by both sides. Imports torch only.

N: positions, V: vocabulary, or this rank's part of it, K: tokens of a teacher that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


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
class Top:
    """What a teacher thinks most likely at each position; log-probabilities of its logits divided by a temperature.

    ids: [N, K], any integers. log_probs: [N, K]. rest: [N], of all other tokens together, -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor
    rest: Tensor

    def __getitem__(self, which: Tensor | slice) -> Top:
        """Of some positions: numbers, a mask, or some that follow each other."""
        return Top(self.ids[which], self.log_probs[which], self.rest[which])

    def to(self, move: Callable[[Tensor], Tensor]) -> Top:
        return Top(move(self.ids), move(self.log_probs), move(self.rest))

    def within(self, rows: int) -> Top:
        """Without tokens beyond a vocabulary of `rows`, of which a student knows nothing."""
        return Top(self.ids, self.log_probs.masked_fill(self.ids >= rows, -torch.inf), self.rest)


def top_of(logits: Tensor, k: int, temperature: float) -> Top:
    """The K likeliest of each position, all of them if there are fewer: of logits [N, V]; int32, fp32, fp32."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    found = log_probs.topk(min(k, log_probs.shape[1]), -1)
    # Not 1 less the others' sum: what is left of it is rounding where the rest is small.
    rest = log_probs.scatter(1, found.indices, -torch.inf).logsumexp(-1)
    return Top(found.indices.int(), found.values, rest)


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
        return parts.total(self._terms(s, t).sum(-1))

    def of_top(self, student: Tensor, teacher: Top, parts: Parts | None = None, first: int = 0) -> Tensor:
        """As a call, from what is known of the teacher: all tokens but its K likeliest count as one.

        So it is a divergence of K + 1 outcomes: it is 0 only where student and teacher agree on each of them, it is never
        above the whole one, and it is that where K is the vocabulary. Without the rest, probabilities of the K made to add
        up to 1, the student could give any probability to the others.

        Args: first: row of the vocabulary that the student's logits [N, V] begin with.
        """
        parts = parts or Parts()
        s, rows = self._log_probs(student, parts), student.shape[1]
        # They add up to 1 but for the rounding that they were stored with, and for tokens left out by `within`.
        t = torch.cat([teacher.log_probs.float(), teacher.rest.float()[:, None]], -1).log_softmax(-1)
        t, t_rest = t[:, :-1], t[:, -1]
        places = teacher.ids.long() - first
        here = (places >= 0) & (places < rows) & (t > -torch.inf)
        others = torch.ones(len(s), rows + 1, dtype=torch.bool, device=s.device)
        others.scatter_(1, torch.where(here, places, rows), False)
        left = parts.total((s.exp() * others[:, :rows]).sum(-1))
        s_rest = left.clamp(min=torch.finfo(left.dtype).tiny).log()
        known = torch.where(here, s.gather(1, places.clamp(0, rows - 1)), 0.0)
        terms = self._terms(known, torch.where(here, t, 0.0)) * here
        has_rest = t_rest > -torch.inf
        rest = self._terms(torch.where(has_rest, s_rest, 0.0), torch.where(has_rest, t_rest, 0.0)) * has_rest
        return parts.total(terms.sum(-1)) + rest

    def _terms(self, s: Tensor, t: Tensor) -> Tensor:
        """What each token, or each set of them, adds to the divergence, from log-probabilities."""
        if self.beta == 0:
            return _term(t, s)
        if self.beta == 1:
            return _term(s, t)
        weight = torch.tensor(self.beta, device=s.device)
        mixture = torch.logaddexp(s + torch.log1p(-weight), t + torch.log(weight))
        return self.beta * _term(t, mixture) + (1 - self.beta) * _term(s, mixture)

    def _log_probs(self, logits: Tensor, parts: Parts) -> Tensor:
        logits = logits.float() / self.temperature
        logits = logits - parts.largest(logits.detach().amax(-1))[:, None]
        return logits - parts.shared(parts.total(logits.exp().sum(-1)).log())[:, None]


def _term(p: Tensor, q: Tensor) -> Tensor:
    """P (log P - log Q), from log-probabilities."""
    return p.exp() * (p - q)


Terms = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


def in_chunks(terms: Terms, logits: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
    """What `terms` says of logits [N, V], rows of `at_once` logits at a time: losses [N], others [N] without gradients.

    A row's loss depends on no other row. Its gradient is taken at once, so that of all rows the logits and their gradient
    stay, in their own dtype, and what a loss needs besides is there for one chunk only.
    """
    losses, others = _Chunks.apply(logits, terms, max(at_once // logits.shape[1], 1))  # type: ignore[no-untyped-call]
    return losses, others


class _Kept(FunctionCtx):
    needs_input_grad: tuple[bool, ...]
    gradient: Tensor | None


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, logits: Tensor, terms: Terms, size: int) -> tuple[Tensor, Tensor]:
        trained = ctx.needs_input_grad[0]
        ctx.gradient = torch.empty_like(logits) if trained else None
        found = []
        # Also of no rows: ranks with parts of a vocabulary meet in it.
        for first in range(0, max(len(logits), 1), size):
            rows = slice(first, first + size)
            with torch.set_grad_enabled(trained):
                part = logits[rows].detach().requires_grad_(trained)
                loss, other = terms(part, rows)
                if ctx.gradient is not None:
                    (ctx.gradient[rows],) = torch.autograd.grad(loss.sum(), part)
            found.append((loss.detach(), other.detach()))
        losses, others = (torch.cat(values) for values in zip(*found, strict=True))
        ctx.mark_non_differentiable(others)
        return losses, others

    @staticmethod
    def backward(ctx: _Kept, *weights: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        """weights: of the losses [N]. Once: they are multiplied into what was kept."""
        gradient, ctx.gradient = ctx.gradient, None
        return None if gradient is None else gradient.mul_(weights[0][:, None]), None, None
