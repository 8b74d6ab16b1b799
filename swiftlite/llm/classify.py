"""What a model with a head says of conversations: classes or numbers, a reward; for `swiftlite infer`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.arguments.infer import InferArguments
from swiftlite.llm.answers import as_row
from swiftlite.llm.dataset.classes import Labels, names_of
from swiftlite.llm.dataset.loader import Question
from swiftlite.llm.dataset.preprocess import Row, RowError
from swiftlite.llm.dataset.report import printable
from swiftlite.llm.generate import load_for_inference
from swiftlite.llm.model.heads import logits_at
from swiftlite.llm.train.heads import PooledCollator
from swiftlite.train.classification import ClassificationLoss
from swiftlite.utils.errors import TemplateError
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template


@dataclass
class Classifier:
    """names: of the classes, empty where they are numbers only. sums: of the rows that had labels, see `summary`."""

    model: PreTrainedModel
    template: Template
    labels: Labels
    names: Sequence[str] = ()
    sums: dict[str, float] = field(default_factory=dict)
    pairs: list[bool] = field(default_factory=list)

    @classmethod
    def from_arguments(cls, args: InferArguments) -> Classifier:
        """Load what resolved `args` names. Raises: UsageError, CheckpointError."""
        model, template = load_for_inference(args)
        kind = "regression" if args.num_labels == 1 else "single_label_classification"
        labels = Labels(args.problem_type or kind, args.num_labels or 1)
        return cls(model, template, labels, names_of(model.config.id2label, labels.num_labels))

    @torch.inference_mode()
    def logits(self, rows: Sequence[Row]) -> list[Tensor | TemplateError]:
        """[N], fp32 on the CPU, of each row's messages, or why it cannot be read."""
        encoded = self.template.encode_batch(list(rows))
        samples = [sample for sample in encoded if isinstance(sample, dict)]
        found: Iterator[Tensor] = iter(())
        if samples:
            batch = {
                name: tensor.to(self.model.device)
                for name, tensor in PooledCollator(self.template).rows(samples).items()
            }
            found = iter(logits_at(self.model, batch, batch.pop("pooled")).float().cpu())
        return [s if isinstance(s, TemplateError) else next(found) for s in encoded]

    def said(self, logits: Tensor) -> Json:
        """`response`: a class, a list of classes, or numbers; `logits`; `name` of classes that have any."""
        kind = self.labels.problem_type
        if kind == "regression":
            return {"response": logits.tolist() if len(logits) > 1 else float(logits)}
        several = kind == "multi_label_classification"
        classes = (logits > 0).nonzero().flatten().tolist() if several else [int(logits.argmax())]
        names = [self.names[i] for i in classes] if self.names else []
        named: Json = {"name": names if several else names[0]} if self.names else {}
        return {"response": classes if several else classes[0], **named, "logits": logits.tolist()}

    def answer_rows(self, rows: Sequence[Question], batch_size: int) -> Iterator[Json]:
        """Each row with what `said` gives and `labels`, where it has one; `rejected` is the number of a rejected answer.

        A row that cannot be read gets `response` None and `error`.
        """
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            good = [standard for _, _, standard in part if not isinstance(standard, RowError)]
            found = iter(self.logits(good) if good else ())
            others = [{"messages": row["rejected_messages"]} for row in good if self._is_pair(row)]
            rejected = iter(self.logits(others) if others else ())
            for place, raw, standard in part:
                row = as_row(raw)
                logits = standard if isinstance(standard, RowError) else next(found)
                other = None if isinstance(standard, RowError) or not self._is_pair(standard) else next(rejected)
                if isinstance(logits, Exception) or isinstance(standard, RowError):
                    yield {**row, "response": None, "error": f"{place}: {printable(str(logits))}"}
                    continue
                yield {**row, **self.said(logits), **self._compared(standard, logits, other)}

    def _is_pair(self, row: Row) -> bool:
        return self.labels.num_labels == 1 and "rejected_messages" in row

    def _compared(self, row: Row, logits: Tensor, rejected: Tensor | TemplateError | None) -> Json:
        """The row's own label or rejected answer, which `summary` counts."""
        if isinstance(rejected, Tensor):
            self.pairs.append(bool(logits > rejected))
            return {"rejected": float(rejected)}
        try:
            label = self.labels.read(row)
        except RowError:
            return {}
        loss = ClassificationLoss(self.labels.problem_type, self.labels.num_labels)
        for name, value in loss.sums(logits[None], self.labels.tensor([label]), by_class=True).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        return {"labels": label}

    def summary(self) -> str:
        """Of all rows that said what is right; nothing where none did."""
        found: dict[str, float] = {}
        if self.sums:
            found = ClassificationLoss(self.labels.problem_type, self.labels.num_labels).metrics(self.sums)
        if self.pairs:
            found["accuracy of pairs"] = sum(self.pairs) / len(self.pairs)
        return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
