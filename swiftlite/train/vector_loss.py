"""Losses of embedding models, from vectors of texts; shared by both sides. Imports torch only.

Letters: R rows of a micro batch, each an anchor, its positive and any number of negatives; B texts, N documents (positives
and negatives), D numbers of a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from swiftlite.train.gather import gather_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from swiftlite.arguments.groups import GroupArguments

ANCHOR, POSITIVE = 0, 1
NEGATIVE = 2
_PAIRS = ("cosine_similarity", "contrastive", "online_contrastive")  # of anchor and positive, with a label
_NOTHING = float("-inf")


@dataclass(frozen=True)
class Vectors:
    """Texts as vectors.

    values: [B, D], of any length. rows: int64 [B], to which row each belongs, from 0 on, in order. roles: int64 [B], ANCHOR,
    POSITIVE (one of each in a row) or NEGATIVE. labels: float [R], of each row's pair; NaN where there is none.
    """

    values: Tensor
    rows: Tensor
    roles: Tensor
    labels: Tensor

    @property
    def units(self) -> Tensor:
        """[B, D] fp32, of length 1: their products are cosines."""
        return normalize(self.values.float(), dim=-1)


def pool_last(hidden: Tensor, ends: Tensor) -> Tensor:
    """[B, D]: what a model says at the last token of each text.

    hidden: [rows, S, D], padded on either side, or texts joined end to end. ends: int64 [B], places in rows x S.
    """
    return hidden.flatten(0, 1)[ends]


@dataclass(frozen=True)
class VectorLoss:
    """The loss of a row by `loss_type`; a mean over the rows of a global batch.

    infonce: cross entropy of choosing an anchor's positive among documents by cosine / temperature. Negatives are its row's,
    and with `use_batch` all other documents of the micro batch; of several ranks, of all ranks' micro batches. Further
    passes of a step (gradient accumulation) are batches of their own. include_qq: other anchors are negatives too.
    include_dd: so are other rows' documents, by their cosine with the positive. mask_fake_negative: what is nearer than the
    positive by more than `fake_neg_margin` is left out.
    cosine_similarity: (cosine - label)^2. contrastive, online_contrastive: label 1 draws a pair together, label 0 pushes it
    apart until its distance (1 - cosine) is `margin`; online: only pairs that are not yet in order in the micro batch (of
    all ranks), added up instead of averaged.
    Sources: sentence-transformers 6.2, MultipleNegativesRankingLoss (temperature = 1 / scale; directions query_to_query,
    doc_to_doc), CosineSimilarityLoss, ContrastiveLoss, OnlineContrastiveLoss; masks: Qwen3-Embedding, arXiv 2506.05176.
    """

    loss_type: str = "infonce"
    temperature: float = 0.1
    use_batch: bool = True
    mask_fake_negative: bool = False
    fake_neg_margin: float = 0.1
    include_qq: bool = False
    include_dd: bool = False
    margin: float = 0.5

    @classmethod
    def of(cls, args: GroupArguments, loss_type: str) -> VectorLoss:
        """What the flags say."""
        return cls(
            loss_type, args.infonce_temperature, args.infonce_use_batch, args.infonce_mask_fake_negative,
            args.infonce_fake_neg_margin, args.infonce_include_qq, args.infonce_include_dd,
        )  # fmt: skip

    @property
    def needs_labels(self) -> bool:
        return self.loss_type in _PAIRS

    @property
    def names(self) -> tuple[str, ...]:
        """Of `sums`."""
        if self.loss_type == "infonce":
            return ("loss", "rows", "margin", "compared", "correct")
        if self.loss_type == "cosine_similarity":
            return ("loss", "rows", "cosines", "labels", "cc", "ll", "cl")
        return ("loss", "rows", "labels", "positive", "negative", "correct")

    @property
    def gathers(self) -> bool:
        """Does a rank's loss depend on the other ranks' texts? Then `sums` is collective."""
        return self.loss_type == "online_contrastive" or (self.loss_type == "infonce" and self.use_batch)

    def sums(self, mine: Vectors, group: ProcessGroup | None = None) -> dict[str, Tensor]:
        """What `total` and `metrics` take: scalars to add up over batches and ranks; `loss` has gradients.

        group: the ranks whose texts are negatives of each other: those of data parallelism. None: all.
        """
        with torch.autocast(mine.values.device.type, enabled=False):  # cosines are divided by a small temperature
            mine = replace(mine, values=mine.units)
            return self._infonce(mine, group) if self.loss_type == "infonce" else self._pairs(mine, group)

    def total(self, loss_sum: Tensor, rows: Tensor) -> Tensor:
        """Mean over rows, of sums that may be one micro batch's while `rows` are the global batch's: results add up."""
        return loss_sum / torch.as_tensor(rows).clamp(min=1)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What a log line says, from sums over any number of batches.

        infonce: `accuracy`, share of the anchors that are nearest to their positive; `margin`, cosine with it less cosine
        with the nearest negative, of rows that have one. Pairs: `positive` and `negative`, mean cosines of pairs with label
        1 and 0; `margin`, the difference; `accuracy`, share on the right side of the margin; `pearson`, correlation of
        cosines and labels (cosine_similarity).
        """
        rows = max(sums["rows"], 1.0)
        found = {"loss": sums["loss"] / rows}
        if self.loss_type == "infonce":
            found["margin"] = sums["margin"] / max(sums["compared"], 1.0)
            found["accuracy"] = sums["correct"] / rows
            return found
        if self.loss_type == "cosine_similarity":
            found["pearson"] = _pearson(sums, rows)
            return found
        ones = sums["labels"]
        found["positive"] = sums["positive"] / max(ones, 1.0)
        found["negative"] = sums["negative"] / max(sums["rows"] - ones, 1.0)
        found["margin"] = found["positive"] - found["negative"]
        found["accuracy"] = sums["correct"] / rows
        return found

    # ---- infonce ----

    def _infonce(self, mine: Vectors, group: ProcessGroup | None) -> dict[str, Tensor]:
        everybody, first = _gathered(mine, group) if self.use_batch else (mine, 0)
        anchors = mine.values[mine.roles == ANCHOR]
        rows = torch.arange(first, first + len(anchors), device=anchors.device)[:, None]
        is_document = everybody.roles != ANCHOR
        documents, owners = everybody.values[is_document], everybody.rows[is_document]
        own = owners == rows  # [R, N]
        matches = own & (everybody.roles[is_document] == POSITIVE)
        cosines = anchors @ documents.T
        positive = cosines[matches]  # [R]: one in each row
        limit = positive.detach()[:, None] + (self.fake_neg_margin if self.mask_fake_negative else math.inf)

        def candidates(cosines: Tensor, hidden: Tensor) -> Tensor:
            return cosines.masked_fill(hidden | (cosines.detach() > limit), _NOTHING)

        negatives = candidates(cosines, matches if self.use_batch else matches | ~own)
        terms = [positive[:, None], negatives]
        if self.include_qq:
            others = everybody.values[everybody.roles == ANCHOR]
            terms.append(candidates(anchors @ others.T, torch.arange(len(others), device=rows.device) == rows))
        if self.include_dd:
            terms.append(candidates(mine.values[mine.roles == POSITIVE] @ documents.T, own))
        losses = torch.logsumexp(torch.cat(terms, 1) / self.temperature, 1) - positive / self.temperature
        nearest = negatives.detach().amax(1) if negatives.shape[1] else torch.full_like(positive, _NOTHING)
        compared = nearest > _NOTHING
        margins = torch.where(compared, positive.detach() - nearest, 0.0)
        return {
            "loss": losses.sum(),
            "rows": losses.new_full((), float(len(losses))),
            "margin": margins.sum(),
            "compared": compared.float().sum(),
            "correct": (positive.detach() > nearest).float().sum(),
        }

    # ---- pairs with labels ----

    def _pairs(self, mine: Vectors, group: ProcessGroup | None) -> dict[str, Tensor]:
        cosines = (mine.values[mine.roles == ANCHOR] * mine.values[mine.roles == POSITIVE]).sum(-1)
        labels = mine.labels.to(cosines)
        sums = {"rows": cosines.new_full((), float(len(cosines)))}
        seen = cosines.detach()
        if self.loss_type == "cosine_similarity":
            moments = {"cosines": seen, "labels": labels, "cc": seen**2, "ll": labels**2, "cl": seen * labels}
            return {"loss": ((cosines - labels) ** 2).sum(), **sums, **{n: v.sum() for n, v in moments.items()}}
        distances = 1 - cosines
        if self.loss_type == "contrastive":
            losses = 0.5 * (labels * distances**2 + (1 - labels) * relu(self.margin - distances) ** 2)
        else:
            losses = self._online(distances, labels, group)
        return {
            "loss": losses.sum(),
            **sums,
            "labels": labels.sum(),
            "positive": (seen * labels).sum(),
            "negative": (seen * (1 - labels)).sum(),
            "correct": ((distances.detach() < self.margin) == (labels > 0.5)).float().sum(),
        }

    def _online(self, distances: Tensor, labels: Tensor, group: ProcessGroup | None) -> Tensor:
        """Which pairs count is settled by all of the micro batch, and the losses are added up: hence the factor, as
        `total` divides by rows. A pass of a step is one such sum; of several passes the mean."""
        all_distances, all_labels = gather_rows(distances.detach(), group), gather_rows(labels, group)
        near, far = all_distances[all_labels == 1], all_distances[all_labels == 0]
        if not len(near) + len(far):
            return distances * 0.0
        highest = near.max() if len(near) else far.mean()
        lowest = far.min() if len(far) else near.mean()
        drawn = (labels == 1) & (distances > lowest)
        pushed = (labels == 0) & (distances < highest)
        losses = torch.where(drawn, distances**2, 0.0) + torch.where(pushed, relu(self.margin - distances) ** 2, 0.0)
        return losses * len(all_distances)


def _gathered(mine: Vectors, group: ProcessGroup | None) -> tuple[Vectors, int]:
    """(all ranks' vectors with rows numbered through, number of this rank's first row). Collective."""
    device = mine.values.device
    counts = gather_rows(torch.tensor([len(mine.labels)], device=device), group)
    rank = torch.distributed.get_rank(group) if len(counts) > 1 else 0
    first = int(counts[:rank].sum())
    values, roles = gather_rows(mine.values, group), gather_rows(mine.roles, group)
    return Vectors(values, gather_rows(mine.rows + first, group), roles, gather_rows(mine.labels, group)), first


def _pearson(sums: dict[str, float], rows: float) -> float:
    mean = {name: sums[name] / rows for name in ("cosines", "labels", "cc", "ll", "cl")}
    spread = (mean["cc"] - mean["cosines"] ** 2) * (mean["ll"] - mean["labels"] ** 2)
    return (mean["cl"] - mean["cosines"] * mean["labels"]) / math.sqrt(spread) if spread > 0 else 0.0
