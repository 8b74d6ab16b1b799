"""How well documents answer queries, by a model with a head or by its words yes and no; for `swiftlite infer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch

from swiftlite.arguments.infer import InferArguments
from swiftlite.llm.answers import as_row
from swiftlite.llm.dataset.groups import TextEncoder, answered, judged, judging_tokens
from swiftlite.llm.dataset.loader import Question
from swiftlite.llm.dataset.preprocess import Row, RowError
from swiftlite.llm.dataset.report import printable
from swiftlite.llm.generate import load_for_inference
from swiftlite.llm.train.grouped import GenerativeReranker, GroupCollator, Reranker
from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Outcome, Template


@dataclass
class DocumentJudge:
    """scorer: gives the scores. sums: of the rows that have other documents, see `summary`."""

    model: PreTrainedModel
    template: Template
    task_type: str
    scorer: Reranker
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_arguments(cls, args: InferArguments) -> DocumentJudge:
        """Load what resolved `args` names. Raises: UsageError, CheckpointError."""
        model, template = load_for_inference(args)
        loss = RankingLoss()
        if args.task_type == "reranker":
            return cls(model, template, "reranker", Reranker(loss))
        scorer = GenerativeReranker(loss, *judging_tokens(args, template))
        return cls(model, template, "generative_reranker", scorer)

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> list[list[float] | TemplateError]:
        """Of each row's documents, positives first; or why they cannot be read."""
        write = answered if self.task_type == "reranker" else judged
        found: list[list[float] | TemplateError] = []
        for row in rows:
            documents = [*row["positive_messages"], *row["negative_messages"]]
            encoded = self._encode([{"messages": write(row["messages"], document)} for document in documents])
            wrong = next((sample for sample in encoded if isinstance(sample, TemplateError)), None)
            if wrong is not None:
                found.append(wrong)
                continue
            samples = [list(sample["input_ids"]) for sample in encoded if isinstance(sample, dict)]
            relevant = [row.get("label", 1.0)] * len(row["positive_messages"]) + [0.0] * len(row["negative_messages"])
            item = {
                "input_ids": [i for ids in samples for i in ids],
                "sizes": [*map(len, samples)],
                "relevant": relevant,
            }
            batch = {
                n: t.to(self.model.device) for n, t in GroupCollator(self.template, self.task_type)([item]).items()
            }
            scores = self.scorer.scores(self.model, batch).float()
            if row["positive_messages"]:
                for name, value in self.scorer.ranking_loss.sums(scores, batch["groups"], batch["relevant"]).items():
                    self.sums[name] = self.sums.get(name, 0.0) + float(value)
            found.append(scores.tolist())
        return found

    def _encode(self, samples: list[Row]) -> list[Outcome]:
        plain = TextEncoder.of(self.template, self.task_type)
        return list(plain(samples)) if plain is not None else self.template.encode_batch(samples)

    def answer_rows(self, rows: Sequence[Question], batch_size: int) -> Iterator[Json]:
        """Each row with `response`, the scores of its documents: of positives, then of negatives.

        A row that cannot be read gets `response` None and `error`. batch_size: rows between two results.
        """
        remaining = iter(rows)
        while part := list(islice(remaining, batch_size)):
            good = [row for _, _, row in part if not isinstance(row, RowError) and _has_documents(row)]
            found = iter(self.scores(good))
            for place, raw, standard in part:
                said = standard if isinstance(standard, RowError) else next(found) if _has_documents(standard) else None
                if isinstance(said, list):
                    yield {**as_row(raw), "response": said}
                    continue
                why = str(said) if isinstance(said, Exception) else "no document; give positive_messages or positive"
                yield {**as_row(raw), "response": None, "error": f"{place}: {printable(why)}"}

    def summary(self) -> str:
        """Of the rows that say what answers; nothing where none did."""
        named = self.scorer.metrics(self.sums) if self.sums else {}
        return ", ".join(f"{name} {value:.4f}" for name, value in named.items() if name != "loss")


def _has_documents(row: Row) -> bool:
    return bool(row["positive_messages"] or row["negative_messages"])
