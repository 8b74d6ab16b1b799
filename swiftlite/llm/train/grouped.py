"""Embedding models and rerankers as objectives of the transformers engine: batches of groups, what a model says at the last
token of each text, the loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.sentence import SentenceFiles
from swiftlite.llm.dataset.groups import group_facts, judging_tokens, load_groups, samples_of
from swiftlite.llm.model.heads import logits_at
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.heads import PooledCollator
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.objective import Batch, Objective
from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.train.vector_loss import VectorLoss, Vectors, pool_last
from swiftlite.utils.dist import get_rank
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

# What a batch holds besides the model's inputs.
_NOT_INPUTS = ("pooled", "groups", "roles", "pair_labels", "relevant", "absent", "counts")


class GroupCollator(PooledCollator):
    """Items of a GroupDataset -> one batch of all their samples, group by group; rows, or joined to one sequence.

    Returns: input_ids, position_ids, attention_mask [B, S] (joined: [1, S], without a mask). Of each sample, [B]: `pooled`,
    the place of its last token in rows x S, and what `group_facts` says.
    """

    def __init__(self, template: Template, task_type: str) -> None:
        super().__init__(template)
        self.task_type = task_type

    def last(self, ids: Sequence[int]) -> int:
        """Texts may end with the token of padding, which transformers' classifiers do not read."""
        return super().last(ids) if self.task_type == "reranker" else len(ids) - 1

    def __call__(self, items: Sequence[Json]) -> Batch:
        return {**self.rows(samples_of(items)), **group_facts(items)}


def group_lengths(item: Json) -> list[int]:
    """Tokens of each sample of a group."""
    return list(item["sizes"])


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in _NOT_INPUTS}


class Embedding:
    """The objective of a loss on vectors: a model's last hidden state at the last token of each text, of length 1."""

    counts: tuple[str, ...] = ("rows",)

    def __init__(self, loss: VectorLoss) -> None:
        self.vector_loss = loss
        self.gathers = loss.gathers

    def count(self, batch: Batch) -> list[int]:
        return [len(batch["pair_labels"])]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        vectors = pool_last(model(**_inputs(batch))[0], batch["pooled"])
        found = Vectors(vectors, batch["groups"], batch["roles"], batch["pair_labels"])
        if "absent" in batch:
            found = Vectors(vectors[:0], found.rows[:0], found.roles[:0], found.labels[:0])
        return self.vector_loss.sums(found)

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.vector_loss.total(sums["loss"], sums["rows"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.vector_loss.metrics(sums)


class Reranker:
    """The objective of a loss on scores: those of a head."""

    gathers = False

    def __init__(self, loss: RankingLoss) -> None:
        self.ranking_loss = loss
        self.counts: tuple[str, ...] = (loss.counted,)

    def count(self, batch: Batch) -> list[int]:
        return [self.ranking_loss.count(batch["groups"])]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.ranking_loss.sums(self.scores(model, batch), batch["groups"], batch["relevant"])

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[B]"""
        return logits_at(model, _inputs(batch), batch["pooled"]).squeeze(-1)

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.ranking_loss.total(sums["loss"], sums[self.ranking_loss.counted])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.ranking_loss.metrics(sums)


class GenerativeReranker(Reranker):
    """... how much likelier than `no` the word `yes` is as the answer, in logits."""

    def __init__(self, loss: RankingLoss, yes: int, no: int) -> None:
        """yes, no: numbers of the two tokens."""
        super().__init__(loss)
        self.yes, self.no = yes, no

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[B]; the vocabulary is computed at the last tokens alone, where the model can do that."""
        inputs, ends = _inputs(batch), batch["pooled"]
        if _keeps_logits(model):
            length = batch["input_ids"].shape[1]
            places, index = torch.unique(ends % length, return_inverse=True)
            logits = model(**inputs, logits_to_keep=places).logits[ends // length, index]
        else:
            logits = pool_last(model(**inputs).logits, ends)
        return logits[:, self.yes].float() - logits[:, self.no].float()


def _keeps_logits(model: torch.nn.Module) -> bool:
    """Does a model, whatever it is wrapped in, take the places where logits are asked for?"""
    inner = getattr(model, "module", model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def train_groups(args: SftArguments) -> Json:
    """Train an embedding model or a reranker. Returns, raises: as sft_main."""
    with started(args, load_groups) as (model, template, data, start):
        objective = _objective(args, template)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        collate = GroupCollator(template, str(args.task_type))
        trainer = HfTrainer(args, model, template, objective, collate, group_lengths)
        if args.task_type == "embedding" and get_rank() == 0:
            trainer.chat = SentenceFiles(model.config.get_text_config().hidden_size, args.max_length)
        return run(trainer, data, start)


def _objective(args: SftArguments, template: Template) -> Objective:
    loss = args.loss_type or args.loss_types[0]
    if args.task_type == "embedding":
        return Embedding(VectorLoss.of(args, loss))
    ranking = RankingLoss(loss, args.listwise_reranker_temperature)
    if args.task_type == "reranker":
        return Reranker(ranking)
    return GenerativeReranker(ranking, *judging_tokens(args, template))
