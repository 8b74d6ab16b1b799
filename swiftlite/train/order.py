"""In which order samples are trained on; the same for every trainer and every parallel layout."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from swiftlite.arguments.train import TrainArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import read_json, write_json
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from typing_extensions import TypeIs

DATA_STATE_FILE = "data_state.json"

# Global batches that are sorted by length together.
_SORTED_BATCHES = 50


class SampleOrder:
    """The endless stream of sample indices: one permutation per epoch, by seed; position n is always the same sample.

    Args: lengths: tokens per sample; batches of `batch_size` are then made of samples of similar length.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: bool = True,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        self.num_samples, self.seed = num_samples, seed
        self.shuffle = shuffle
        self.lengths, self.batch_size = lengths, batch_size
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> list[int]:
        import torch

        if not self.shuffle:
            order = list(range(self.num_samples))
        else:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        return order if self.lengths is None else self._grouped(order, epoch)

    def _grouped(self, order: list[int], epoch: int) -> list[int]:
        """Sort within blocks of batches, then shuffle the batches: similar lengths together, no curriculum."""
        assert self.lengths is not None
        batches: list[list[int]] = []
        block = self.batch_size * _SORTED_BATCHES
        for start in range(0, len(order), block):
            part = sorted(order[start : start + block], key=lambda i: -self.lengths[i])  # type: ignore[index]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        # A last, smaller batch stays last, so that the others keep their borders.
        tail = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        random.Random(f"{self.seed}-{epoch}-batches").shuffle(batches)
        return [i for batch in [*batches, *tail] for i in batch]

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self.num_samples)
        return self._permutation(epoch)[index]

    def slice(self, start: int, stop: int) -> list[int]:
        return [self[position] for position in range(start, stop)]


class StreamOrder:
    """The order of a StreamedDataset: its own."""

    num_samples: int | None = None

    def __getitem__(self, position: int) -> int:
        return position

    def slice(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))


class Samples(Protocol):
    """Data of a known length."""

    @property
    def lengths(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Json: ...

    def content_hash(self) -> str: ...


class Stream(Protocol):
    """Data of an unknown length, read on the way."""

    is_streaming: bool
    facts: dict[str, object]

    def __getitem__(self, index: int) -> Json: ...

    def state(self, position: int) -> Json: ...

    def load_state(self, state: Json) -> None: ...


Dataset: TypeAlias = Samples | Stream
Data: TypeAlias = tuple[Dataset, Samples | None]  # to train on, to evaluate with


def is_stream(dataset: Dataset) -> TypeIs[Stream]:
    return getattr(dataset, "is_streaming", False)


def order_of(dataset: Dataset, args: TrainArguments, global_batch_size: int) -> SampleOrder | StreamOrder:
    """The order in which a run with these arguments sees a dataset."""
    if is_stream(dataset):
        return StreamOrder()
    seed = args.seed if args.data_seed is None else args.data_seed
    lengths = dataset.lengths if args.group_by_length else None
    return SampleOrder(len(dataset), seed, args.dataset_shuffle, lengths, global_batch_size)


def write_data_state(dataset: Dataset, directory: Path, position: int) -> None:
    """Next to a checkpoint: what the data was, and how to find sample `position` of a stream again without reading what is
    before it. The order of map-style data is a function of the position.
    """
    state = dataset.state(position) if is_stream(dataset) else {}
    write_json(directory / DATA_STATE_FILE, {**state, **_facts(dataset)})


def _facts(dataset: Dataset) -> Json:
    """What tells one content from another; empty for a stream from a hub or a function."""
    if is_stream(dataset):
        return dict(dataset.facts)
    return {"samples": len(dataset), "content": dataset.content_hash()}


def read_data_state(dataset: Dataset, directory: Path) -> None:
    """Go to where a checkpoint's data stands. A checkpoint without the file costs time only: the stream is read again.

    Raises: UsageError if the data is not what the checkpoint was trained on; CheckpointError for a damaged file.
    """
    path = directory / DATA_STATE_FILE
    stored = read_json(path, optional=True)
    now = _facts(dataset)
    then = {name: stored.pop(name) for name in ("samples", "bytes", "content") if name in stored}
    if now and "content" in then and then != now:
        (what, seen), (_, is_now) = next(iter(then.items())), next(iter(now.items()))
        raise UsageError(
            f"the training data has changed since {directory} was saved ({seen} {what} then, {is_now} now, content "
            f"{str(then['content'])[:8]} then, {now['content'][:8]} now): give the data of then, or begin another run from "
            f"that checkpoint; to resume with the new data all the same, remove {path}"
        )
    if is_stream(dataset):
        if stored:
            dataset.load_state(stored)
        else:
            get_logger().warning("%s is missing: the data is read again up to where the run stopped", path)


def steps_of(dataset: Dataset, args: TrainArguments, global_batch_size: int) -> int:
    """Optimizer steps of a run: `--train_iters`, or what the epochs make.

    Raises: UsageError for a stream without --train_iters: nobody knows how long it is.
    """
    if not is_stream(dataset) and len(dataset) < global_batch_size and not getattr(args, "skip_train", False):
        get_logger().warning(
            "the training data has %d samples, fewer than the global batch of %d: each step repeats samples; lower "
            "--global_batch_size", len(dataset), global_batch_size,
        )  # fmt: skip
    if args.train_iters:
        return int(args.train_iters)
    if is_stream(dataset):
        raise UsageError("--streaming true: the data's length is not known; give --train_iters (or --max_steps) N")
    return math.ceil((args.num_train_epochs or 1.0) * len(dataset) / global_batch_size)
