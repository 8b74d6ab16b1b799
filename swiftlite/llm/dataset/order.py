"""In which order samples are trained on; the same for every trainer and every parallel layout."""

from __future__ import annotations

from functools import lru_cache

import torch


class SampleOrder:
    """The endless stream of sample indices: one permutation per epoch, by seed; position n is always the same sample."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_samples))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.num_samples)
        return self._permutation(epoch)[index]

    def slice(self, start: int, stop: int) -> list[int]:
        return [self[position] for position in range(start, stop)]
