"""Encoded rows as batches: padded to one length, or end to end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100  # a label without a loss


def pad_rows(
    rows: Sequence[Json], pad_token: int, multiple: int, at_least: int, padding_side: str
) -> dict[str, Tensor]:
    """int64 tensors [B, S] input_ids, labels, position_ids and attention_mask; loss_scale float32 where a row has one.

    Args: multiple, at_least: of the length S. padding_side: "right" or "left".
    """
    import torch

    rows = [{**row, "labels": [IGNORE_INDEX, *row["labels"][1:]]} for row in rows]  # nothing predicts a first token
    length = round_up(max(max(len(row["input_ids"]) for row in rows), at_least), multiple)

    def padded(values: Iterable[Sequence[float]], fill: float, dtype: torch.dtype = torch.int64) -> Tensor:
        out = torch.full((len(rows), length), fill, dtype=dtype)
        for i, row in enumerate(values):
            at = slice(len(row)) if padding_side == "right" else slice(length - len(row), length)
            out[i, at] = torch.tensor(row, dtype=dtype)
        return out

    tensors = {
        "input_ids": padded((row["input_ids"] for row in rows), pad_token),
        "labels": padded((row["labels"] for row in rows), IGNORE_INDEX),
        "position_ids": padded((row.get("position_ids") or list(range(len(row["input_ids"]))) for row in rows), 0),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
    }
    if any("loss_scale" in row for row in rows):
        tensors["loss_scale"] = padded(map(_weights_of, rows), 0.0, torch.float32)
    return tensors


def round_up(length: int, multiple: int) -> int:
    """The next multiple of `multiple`, or `length` where it is one."""
    return -(-length // multiple) * multiple


def sample_lengths(row: Json) -> Sequence[int]:
    """Tokens of the samples in a row: one, or those of a packed sequence."""
    return row.get("sample_lengths") or [len(row["input_ids"])]


def join_rows(rows: Sequence[Json]) -> Json:
    """Rows end to end. The first token of each has no label: what precedes it is another row."""
    out: Json = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        out["input_ids"] += row["input_ids"]
        out["labels"] += [IGNORE_INDEX, *row["labels"][1:]]
        out["position_ids"] += row.get("position_ids") or range(len(row["input_ids"]))
    if any("loss_scale" in row for row in rows):
        out["loss_scale"] = [weight for row in rows for weight in [0.0, *_weights_of(row)[1:]]]
    return out


def _weights_of(row: Json) -> list[float]:
    return row.get("loss_scale") or [float(label != IGNORE_INDEX) for label in row["labels"]]
