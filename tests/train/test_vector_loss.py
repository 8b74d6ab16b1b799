"""Losses on vectors against sentence-transformers' own, on the same tensors: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.train.vector_loss import ANCHOR, NEGATIVE, POSITIVE, VectorLoss, Vectors, pool_last

losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

ROWS, WIDTH = 5, 12
LABELS = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])


def columns(count: int) -> list[torch.Tensor]:
    """Anchors, positives and further columns, each [R, D]; some pairs are near each other, so that nothing is trivial."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(ROWS, WIDTH, generator=generator)
    return [base + 0.8 * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(count)]


def as_vectors(given: list[torch.Tensor], labels: torch.Tensor | None = None) -> Vectors:
    """Row by row, as a collator lays texts out."""
    values = torch.stack(given, 1).flatten(0, 1)
    rows = torch.arange(ROWS).repeat_interleave(len(given))
    roles = torch.tensor([ANCHOR, POSITIVE, *[NEGATIVE] * (len(given) - 2)]).repeat(ROWS)
    return Vectors(values, rows, roles, torch.full((ROWS,), float("nan")) if labels is None else labels)


def ours(loss: VectorLoss, given: list[torch.Tensor], labels: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    leaves = [column.clone().requires_grad_() for column in given]
    sums = loss.sums(as_vectors(leaves, labels))
    value = loss.total(sums["loss"], sums["rows"])
    return value.detach(), torch.autograd.grad(value, leaves)


def theirs(loss: Any, given: list[torch.Tensor], labels: torch.Tensor | None) -> tuple[torch.Tensor, Any]:
    leaves = [column.clone().requires_grad_() for column in given]
    value = loss.compute_loss_from_embeddings(leaves, labels)
    return value.detach(), torch.autograd.grad(value, leaves)


CASES = {
    "infonce": (VectorLoss(), losses.MultipleNegativesRankingLoss(None, scale=10), 2, False),
    "infonce with negatives": (
        VectorLoss(temperature=0.05), losses.MultipleNegativesRankingLoss(None, scale=20), 4, False,
    ),
    "infonce of all directions": (
        VectorLoss(include_qq=True, include_dd=True),
        losses.MultipleNegativesRankingLoss(
            None, scale=10, directions=("query_to_doc", "query_to_query", "doc_to_doc")
        ),
        3, False,
    ),
    "cosine_similarity": (VectorLoss("cosine_similarity"), losses.CosineSimilarityLoss(None), 2, True),
    "contrastive": (VectorLoss("contrastive"), losses.ContrastiveLoss(None), 2, True),
    "online_contrastive": (VectorLoss("online_contrastive"), losses.OnlineContrastiveLoss(None), 2, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equal_to_sentence_transformers(name: str) -> None:
    mine, other, count, has_labels = CASES[name]
    given, labels = columns(count), LABELS if has_labels else None
    value, gradients = ours(mine, given, labels)
    wanted, wanted_gradients = theirs(other, given, labels)
    assert wanted > 0.01
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [torch.ones(ROWS), torch.zeros(ROWS)])
def test_online_contrastive_of_one_kind(labels: torch.Tensor) -> None:
    """A micro batch in which all pairs match, or none."""
    value, gradients = ours(VectorLoss("online_contrastive"), columns(2), labels)
    wanted, wanted_gradients = theirs(losses.OnlineContrastiveLoss(None), columns(2), labels)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


def test_without_the_batch() -> None:
    """Each anchor chooses among its own documents alone; rows may have different numbers of negatives."""
    given = columns(4)
    cosines = torch.nn.functional.cosine_similarity(given[0][:, None], torch.stack(given[1:], 1), dim=-1)
    vectors = as_vectors(given)
    value = VectorLoss(use_batch=False).sums(vectors)["loss"]
    torch.testing.assert_close(
        value, cross_entropy(10 * cosines, torch.zeros(ROWS, dtype=torch.int64), reduction="sum")
    )
    kept = torch.ones(len(vectors.rows), dtype=torch.bool)
    kept[-1] = False  # the last row has one negative less
    fewer = Vectors(vectors.values[kept], vectors.rows[kept], vectors.roles[kept], vectors.labels)
    wanted = cross_entropy(10 * cosines[-1:, :2], torch.zeros(1, dtype=torch.int64)) + cross_entropy(
        10 * cosines[:-1], torch.zeros(ROWS - 1, dtype=torch.int64), reduction="sum"
    )
    torch.testing.assert_close(VectorLoss(use_batch=False).sums(fewer)["loss"], wanted)


def test_false_negatives_are_left_out() -> None:
    """A document that is as near as the positive plus the margin does not count; one just below does."""
    anchor, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    near, nearer = torch.tensor([[0.69, (1 - 0.69**2) ** 0.5]]), torch.tensor([[0.71, (1 - 0.71**2) ** 0.5]])
    rows, roles = torch.zeros(4, dtype=torch.int64), torch.tensor([ANCHOR, POSITIVE, NEGATIVE, NEGATIVE])
    vectors = Vectors(torch.cat([anchor, positive, near, nearer]), rows, roles, torch.tensor([float("nan")]))
    value = VectorLoss(mask_fake_negative=True, fake_neg_margin=0.1).sums(vectors)["loss"]
    torch.testing.assert_close(value, cross_entropy(torch.tensor([[6.0, 6.9]]), torch.tensor([0])))


def test_autocast_does_not_round_cosines() -> None:
    vectors = as_vectors(columns(3))
    with torch.autocast("cpu", torch.bfloat16):
        inside = VectorLoss().sums(vectors)["loss"]
    torch.testing.assert_close(inside, VectorLoss().sums(vectors)["loss"], rtol=0, atol=0)


def test_metrics() -> None:
    vectors = as_vectors(columns(3))
    found = VectorLoss().metrics({name: float(value) for name, value in VectorLoss().sums(vectors).items()})
    units = vectors.units.view(ROWS, 3, WIDTH)
    cosines = units[:, 0] @ units[:, 1:].flatten(0, 1).T
    positive = cosines[torch.arange(ROWS), 2 * torch.arange(ROWS)]
    nearest = cosines.scatter(1, 2 * torch.arange(ROWS)[:, None], -1.0).amax(1)
    assert found["accuracy"] == pytest.approx(float((positive > nearest).float().mean()))
    assert found["margin"] == pytest.approx(float((positive - nearest).mean()), rel=1e-5)
    pairs = VectorLoss("cosine_similarity")
    labels = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.7])
    found = pairs.metrics({name: float(value) for name, value in pairs.sums(as_vectors(columns(2), labels)).items()})
    given = columns(2)
    table = torch.stack([torch.cosine_similarity(*given), labels])
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(table)[0, 1]), rel=1e-4)


def test_pooling_finds_last_tokens() -> None:
    hidden = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    torch.testing.assert_close(pool_last(hidden, torch.tensor([1, 5])), torch.stack([hidden[0, 1], hidden[1, 2]]))


def test_ranking_losses() -> None:
    """Groups of different sizes, against torch's losses of each group and sentence-transformers' of pairs."""
    scores = torch.tensor([0.3, -1.2, 2.0, 1.1, 0.4, -0.5], requires_grad=True)
    groups, relevant = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
    point = RankingLoss()
    sums = point.sums(scores, groups, relevant)
    value = point.total(sums["loss"], sums[point.counted])
    torch.testing.assert_close(value, binary_cross_entropy_with_logits(scores, relevant))
    listwise = RankingLoss("listwise_reranker", temperature=0.5)
    each = listwise(scores, groups, relevant)
    parts = [(slice(0, 2), 0), (slice(2, 5), 1), (slice(5, 6), 0)]
    wanted = torch.stack([cross_entropy(scores[part] / 0.5, torch.tensor(answer)) for part, answer in parts])
    torch.testing.assert_close(each, wanted)
    found, expected = (torch.autograd.grad(value.sum(), scores)[0] for value in (each, wanted))
    torch.testing.assert_close(found, expected)
    sums = listwise.sums(scores.detach(), groups, relevant)
    metrics = listwise.metrics({name: float(value) for name, value in sums.items()})
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert (metrics["top1"], metrics["mrr"]) == (0.5, 0.75)
    assert metrics["margin"] == pytest.approx((0.3 + 1.2 + 1.1 - 2.0) / 2)
