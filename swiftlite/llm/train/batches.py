"""What a collated batch on the Hugging Face side says about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from swiftlite.train.flops import pairs_of
from swiftlite.train.objective import Batch, Objective
from swiftlite.utils.types import Config, Json

# In this order, before an objective's own counts.
COUNTS = ("tokens", "padded_tokens", "samples", "pairs_attended")

Collate = Callable[[Sequence[Json]], Batch]
Lengths = Callable[[Json], Sequence[int]]


def counting(collate: Collate, objective: Objective, lengths: Lengths, config: Config | None) -> Collate:
    """`collate` with a tensor `counts` next to the batch: COUNTS and the objective's.

    lengths: tokens of a row's samples. config: of the model.
    """
    pairs = pairs_of(config)

    def counted(rows: Sequence[Json]) -> Batch:
        batch = collate(rows)
        sizes = [n for row in rows for n in lengths(row)]
        counts = [sum(sizes), batch["input_ids"].numel(), len(rows), pairs(sizes), *objective.count(batch)]
        batch["counts"] = torch.tensor(counts, dtype=torch.float64)
        return batch

    return counted
