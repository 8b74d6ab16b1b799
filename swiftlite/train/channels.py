"""Loss by channel (`--enable_channel_loss`): rows say with `channel` which group they belong to, each of which has a loss.

Sums over a micro batch that add up over a global batch, as the loss's own do. Shapes: B rows, S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from swiftlite.train.order import Data, is_stream
from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Json

_LOSS, _TOKENS = "channel_loss:", "channel_tokens:"


class _Rows(Protocol):
    def extra_values(self, name: str) -> set[object]: ...


@dataclass(frozen=True)
class Channels:
    """Those of a run's data, training and validation: every rank knows all of them before it begins."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, data: Data) -> Channels:
        """Raises: UsageError for a stream, whose rows nobody has seen yet."""
        found = set[str]()
        for part in data:
            if part is not None and is_stream(part):
                raise UsageError(
                    "--enable_channel_loss true: channels are counted before training; leave out --streaming"
                )
            if part is not None:
                found.update(map(str, cast(_Rows, part).extra_values("channel")))  # "None": of rows that name none
        return cls(tuple(sorted(found)))

    @property
    def sum_names(self) -> tuple[str, ...]:
        return tuple(prefix + name for name in self.names for prefix in (_LOSS, _TOKENS))

    def numbers(self, rows: Sequence[Json]) -> Tensor:
        """int64: the channel of each sample of some rows, packed or not."""
        named = [name for row in rows for name in row.get("channels") or [row.get("channel")]]
        place = {name: number for number, name in enumerate(self.names)}
        return torch.tensor([place.get(str(name), 0) for name in named])

    def sums(self, losses: Tensor, counted: Tensor, channels: Tensor) -> dict[str, Tensor]:
        """Args: losses: of tokens, as they are summed up. counted: which have a label. channels: of each, any number in
        padding. All of one shape."""
        counted, channels = counted.flatten(), channels.flatten()
        totals = losses.new_zeros(2, len(self.names))
        values = torch.stack([losses.detach().flatten().float() * counted, counted.float()])
        totals.index_add_(1, channels, values.to(totals.dtype))
        return dict(zip(self.sum_names, totals.t().flatten().unbind(), strict=True))

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """`loss_CHANNEL` of those that there were."""
        tokens = {name: sums[_TOKENS + name] for name in self.names}
        return {f"loss_{name}": sums[_LOSS + name] / count for name, count in tokens.items() if count}
