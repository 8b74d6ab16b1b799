"""Embedding models and rerankers as objectives of the transformers engine: batches of groups, what a model says at the last
token of each text, the loss."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor

from swiftlite.arguments.groups import GroupArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.sentence import SentenceFiles
from swiftlite.llm.dataset.groups import load_groups, parts_of
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.run import run
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.objective import Batch, Objective
from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.train.vector_loss import ANCHOR, NEGATIVE, POSITIVE, VectorLoss, Vectors, pool_last
from swiftlite.utils.dist import get_rank
from swiftlite.utils.errors import UsageError
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from swiftlite.llm.template.base import Template

# What a batch holds besides the model's inputs.
_NOT_INPUTS = ("ends", "groups", "roles", "pair_labels", "relevant", "absent")


class GroupCollator:
    """Items of a GroupDataset -> one batch of all their samples, group by group; rows, or joined to one sequence.

    Returns: input_ids, position_ids, attention_mask [B, S] (joined: [1, S], without a mask). Of each sample, [B]: `ends`,
    the place of its last token in rows x S; `groups`, which of the batch's groups it belongs to, from 0 on. For embeddings
    `roles` [B] and `pair_labels` [R] (NaN: none); for rerankers `relevant` [B].
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def __call__(self, items: Sequence[Json]) -> Batch:
        parts = [parts_of(item) for item in items]
        rows = [{"input_ids": ids, "labels": [-100] * len(ids)} for texts in parts for ids in texts]
        batch: Batch = self.template.data_collator(rows)
        length = batch.pop("labels").shape[1]
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        first = torch.arange(len(rows)) * length
        if self.template.padding_free:
            batch["ends"] = sizes.cumsum(0) - 1
        else:
            batch["ends"] = first + (sizes - 1 if self.template.padding_side == "right" else length - 1)
        counts = torch.tensor([len(texts) for texts in parts])
        batch["groups"] = torch.repeat_interleave(torch.arange(len(items)), counts)
        if "relevant" in items[0]:
            batch["relevant"] = torch.tensor([value for item in items for value in item["relevant"]])
        else:
            roles = [role for texts in parts for role in (ANCHOR, POSITIVE, *[NEGATIVE] * (len(texts) - 2))]
            batch["roles"] = torch.tensor(roles)
            batch["pair_labels"] = torch.tensor([item.get("label", float("nan")) for item in items])
        return batch


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
        vectors = pool_last(model(**_inputs(batch))[0], batch["ends"])
        found = Vectors(vectors, batch["groups"], batch["roles"], batch["pair_labels"])
        if "absent" in batch:
            found = Vectors(vectors[:0], found.rows[:0], found.roles[:0], found.labels[:0])
        return self.vector_loss.sums(found)

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.vector_loss.total(sums["loss"], sums["rows"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.vector_loss.metrics(sums)


class GenerativeReranker:
    """The objective of a loss on scores: how much likelier than `no` the word `yes` is as the answer, in logits."""

    gathers = False

    def __init__(self, loss: RankingLoss, yes: int, no: int) -> None:
        """yes, no: numbers of the two tokens."""
        self.ranking_loss = loss
        self.yes, self.no = yes, no
        self.counts: tuple[str, ...] = (loss.counted,)

    def count(self, batch: Batch) -> list[int]:
        return [int(batch["groups"][-1]) + 1 if self.ranking_loss.counted == "groups" else len(batch["groups"])]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.ranking_loss.sums(self.scores(model, batch), batch["groups"], batch["relevant"])

    def scores(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """[B]; the vocabulary is computed at the last tokens alone, where the model can do that."""
        inputs, ends = _inputs(batch), batch["ends"]
        if _keeps_logits(model):
            length = batch["input_ids"].shape[1]
            places, index = torch.unique(ends % length, return_inverse=True)
            logits = model(**inputs, logits_to_keep=places).logits[ends // length, index]
        else:
            logits = pool_last(model(**inputs).logits, ends)
        return logits[:, self.yes].float() - logits[:, self.no].float()

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.ranking_loss.total(sums["loss"], sums[self.ranking_loss.counted])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.ranking_loss.metrics(sums)


def _keeps_logits(model: torch.nn.Module) -> bool:
    """Does a model, whatever it is wrapped in, take the places where logits are asked for?"""
    inner = getattr(model, "module", model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def token_of(template: Template, word: str, flag: str) -> int:
    """The one token of a word that a reranker answers with. Raises: UsageError where it is none or several."""
    ids = template.tokenize(word)
    if len(ids) != 1:
        raise UsageError(f"--{flag} {word}: is {len(ids)} tokens of this model; choose a word that is one")
    return ids[0]


def train_groups(args: SftArguments) -> Json:
    """Train an embedding model or a generative reranker. Returns, raises: as sft_main."""
    with started(args, load_groups) as (model, template, data, start):
        objective = _objective(args, template)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        trainer = HfTrainer(args, model, template, objective, GroupCollator(template), group_lengths)
        if args.task_type == "embedding" and get_rank() == 0:
            trainer.chat = SentenceFiles(model.config.get_text_config().hidden_size, args.max_length)
        return run(trainer, data, start)


def _objective(args: SftArguments, template: Template) -> Objective:
    loss = args.loss_type or args.loss_types[0]
    if args.task_type == "embedding":
        return Embedding(vector_loss(args, loss))
    words = ("generative_reranker_positive_token", "generative_reranker_negative_token")
    yes, no = (token_of(template, getattr(args, flag), flag) for flag in words)
    return GenerativeReranker(RankingLoss(loss, args.listwise_reranker_temperature), yes, no)


def vector_loss(args: GroupArguments, loss_type: str) -> VectorLoss:
    """The loss on vectors that the flags say."""
    return VectorLoss(
        loss_type, args.infonce_temperature, args.infonce_use_batch, args.infonce_mask_fake_negative,
        args.infonce_fake_neg_margin, args.infonce_include_qq, args.infonce_include_dd,
    )  # fmt: skip
