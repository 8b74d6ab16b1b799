"""Sequences that another model is asked about before training: log-probabilities of a reference."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

from swiftlite.train.batches import evaluation_samples
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.train.loop import Run

K = TypeVar("K")


class Questions(Generic[K]):
    """Map-style: `[i]` -> {"input_ids", "labels"}, made when it is asked for.

    Args: keys: what each one is. make: the sequence of a key. remember: takes all keys and their answers.
    """

    def __init__(
        self, keys: Sequence[K], make: Callable[[K], Json], remember: Callable[[Sequence[K], Sequence[float]], None]
    ) -> None:
        self.keys, self.make = keys, make
        self._remember = remember

    def remember(self, answers: Sequence[float]) -> None:
        """Give the answers, one of each question, to the dataset that asked."""
        self._remember(self.keys, answers)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Json:
        return self.make(self.keys[index])

    def __iter__(self) -> Iterator[Json]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> list[int]:
        return [len(row["input_ids"]) for row in self]

    def content_hash(self) -> str:
        """xxh3_128 of all tokens and labels in their order."""
        import xxhash

        digest = xxhash.xxh3_128()
        for row in self:
            digest.update(question_bytes(row))
        return digest.hexdigest()


def question_bytes(row: Json) -> bytes:
    """Tokens and labels of a sequence, by which an answer to it is known."""
    columns = (row["input_ids"], row["labels"])
    return b"".join(array("q", [len(values), *values]).tobytes() for values in columns)


class Asking(Protocol[K]):
    """A dataset that wants to know something before training."""

    def questions(self, batches: Iterable[Sequence[int]]) -> Questions[K]:
        """What it wants to know of the samples in these global batches."""


def asked(run: Run) -> Iterator[Questions[object]]:
    """What a run's datasets ask: of all steps, of all evaluation."""
    size = run.global_batch
    steps = (run.order.slice(step * size, (step + 1) * size) for step in range(run.steps))
    yield cast("Asking[object]", run.train_set).questions(steps)
    if run.val_set is not None:
        batches = evaluation_samples(len(run.val_set), size, run.args.eval_iters)
        yield cast("Asking[object]", run.val_set).questions(batches)
