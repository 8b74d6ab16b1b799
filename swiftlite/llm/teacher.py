"""A teacher that reads samples and says which tokens it thinks likely at their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.arguments.export import ExportArguments
from swiftlite.llm.dataset.cache import fingerprint
from swiftlite.llm.dataset.reference import facts_of_weights
from swiftlite.llm.dataset.teacher import answered, vocabulary_hash
from swiftlite.llm.model.loader import embedding_rows
from swiftlite.llm.model.tuner import frozen
from swiftlite.llm.pipeline import read_model
from swiftlite.llm.template.collate import IGNORE_INDEX
from swiftlite.train.distill_loss import Top, top_of
from swiftlite.train.order import Samples
from swiftlite.train.reference import check_teacher, check_teacher_rows, model_directory
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

_TOKENS = 8192  # of a pass, with its padding
_SORTED = 512  # samples that are sorted by length together
_POSITIONS = 1024  # whose log-probabilities are in memory at once


def batches_of(places: Sequence[tuple[Samples, int]], tokens: int = _TOKENS) -> Iterator[list[Json]]:
    """Samples of similar length together, as many as make no more than `tokens` when they are padded.

    places: dataset and number of each sample.
    """
    for start in range(0, len(places), _SORTED):
        batch: list[Json] = []
        for part, i in sorted(places[start : start + _SORTED], key=lambda place: place[0].lengths[place[1]]):
            if batch and (len(batch) + 1) * part.lengths[i] > tokens:
                yield batch
                batch = []
            batch.append(part[i])
        yield batch


class Teacher:
    """The frozen model that `args` name, on the GPUs that there are. template: of the student.

    facts: what decides its answers. Raises: UsageError if its tokens are not the template's.
    """

    def __init__(self, args: ExportArguments, template: Template) -> None:
        named = str(args.teacher_model or args.model)
        directory = model_directory(args, named)
        args.device_map = "auto" if torch.cuda.is_available() else None
        model, tokenizer = read_model(args, str(directory))
        rows, vocabulary = embedding_rows(model), template.tokenizer.get_vocab()
        check_teacher(named, vocabulary, tokenizer.get_vocab())
        check_teacher_rows(named, rows, vocabulary)
        self.model, self.template = frozen(model), template
        self.topk, self.temperature = min(args.teacher_topk, rows), args.temperature
        dtype = args.model_info.torch_dtype
        self.facts: Json = {
            "format": 1, "teacher": named, "weights": facts_of_weights(directory), "computed_in": str(dtype), "rows": rows,
            "topk": self.topk, "temperature": self.temperature,
            # Logits in bf16 are rounded more than float16 rounds their log-probabilities.
            "dtype": "float32" if dtype == torch.float32 else "float16",
            "vocabulary": vocabulary_hash(vocabulary), "encoding": fingerprint(template),
        }  # fmt: skip

    @torch.no_grad()
    def answers(self, samples: list[Json]) -> Iterator[tuple[Json, Top]]:
        """Each sample with its positions. Half as many go at a time where a GPU has no room for all."""
        try:
            tops = self._pass(samples)
        except torch.OutOfMemoryError:
            if len(samples) == 1:
                raise
            tops = None
        if tops is not None:
            yield from zip(samples, tops, strict=True)
            return
        torch.cuda.empty_cache()
        half = len(samples) // 2
        yield from self.answers(samples[:half])
        yield from self.answers(samples[half:])

    def _pass(self, samples: list[Json]) -> list[Top]:
        batch = {name: value.to(self.model.device) for name, value in self.template.data_collator(samples).items()}
        targets = batch.pop("labels")[:, 1:]
        batch.pop("loss_scale", None)
        logits = self.model(**batch).logits[:, : targets.shape[1]][targets != IGNORE_INDEX]
        found = [top_of(part, self.topk, self.temperature).to(Tensor.cpu) for part in logits.split(_POSITIONS)]
        whole = Top(*(torch.cat([getattr(top, name) for top in found]) for name in ("ids", "log_probs", "rest")))
        ends = accumulate(len(answered(sample)) for sample in samples)
        return [whole[torch.arange(end - len(answered(s)), end)] for s, end in zip(samples, ends, strict=True)]
