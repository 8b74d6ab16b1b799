"""`swiftlite megatron sft --task_type embedding`, `reranker`, `generative_reranker`: groups of texts, on megatron-core.

Shapes: N samples of a micro batch, W numbers that a model gives for each of their last tokens, V this rank's rows of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from swiftlite.checkpoint.sentence import SentenceFiles
from swiftlite.llm.dataset.groups import GroupDataset, group_facts, samples_of
from swiftlite.megatron.context import add_up
from swiftlite.megatron.model.head import at_last_tokens, judge_last_tokens
from swiftlite.megatron.shards import unwrap
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.megatron.trainers.loss import LossFunction
from swiftlite.megatron.trainers.pooled import PooledBatch, PooledLoader, PooledTrainer, pooled
from swiftlite.train.loop import Run
from swiftlite.train.order import Data
from swiftlite.train.ranking_loss import RankingLoss
from swiftlite.train.vector_loss import VectorLoss, Vectors
from swiftlite.utils.types import Json


class GroupLoader(PooledLoader):
    """Makes the micro batches of a step from groups. targets: [N, 2 or 3], of each sample its group, from 0 on, and how
    relevant it is; or its row, its role and the label of its row, see Vectors.
    """

    dataset: GroupDataset

    def last(self, ids: Sequence[int]) -> int:
        """Texts may end with the token of padding, which transformers' classifiers do not read."""
        return super().last(ids) if self.dataset.task_type == "reranker" else len(ids) - 1

    def groups(self, samples: Sequence[int]) -> list[Json]:
        return [self.dataset[i] for i in samples if i >= 0]

    def passes(self, micro_batches: Sequence[Sequence[int]]) -> list[list[Json]]:
        """Groups have different numbers of samples; passes that must be of one shape are filled up with rows of padding."""
        nothing = self.rows([-1])
        found = [samples_of(self.groups(samples)) or nothing for samples in micro_batches]
        if self.join:
            return found
        counts = torch.tensor([len(rows) for rows in found])
        if self.one_length:
            counts[:] = counts.max()
        if self.group is not None:
            torch.distributed.all_reduce(counts, torch.distributed.ReduceOp.MAX, group=self.group)
        return [[*rows, *nothing * (count - len(rows))] for rows, count in zip(found, counts.tolist(), strict=True)]

    def complete(self, samples: Sequence[int], batch: MicroBatch) -> PooledBatch:
        facts = group_facts(self.groups(samples))
        groups = facts["groups"]
        if self.dataset.task_type == "embedding":
            columns = [groups, facts["roles"], facts["pair_labels"][groups]]
        else:
            columns = [groups, facts.get("relevant", groups)]
        targets = torch.stack([column.float() for column in columns], 1)
        return pooled(batch, len(groups), targets, self.last)


class RerankerTrainer(PooledTrainer):
    """The loss of the scores that a head gives; see RankingLoss."""

    loader = GroupLoader

    def see(self, data: Data) -> None:
        args, nothing = self.args, torch.zeros(0)
        self.ranking = RankingLoss(args.loss_type or args.loss_types[0], args.listwise_reranker_temperature)
        self.counted = self.ranking.counted
        self.sums = tuple(self.ranking.sums(nothing, nothing, nothing))

    def count(self, batch: PooledBatch) -> float:
        return self.ranking.count(batch.targets[:, 0])

    def judge(self, batch: PooledBatch, outputs: Tensor) -> dict[str, Tensor]:
        return self.ranking.sums(outputs.squeeze(-1), batch.targets[:, 0], batch.targets[:, 1])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.ranking.metrics(sums)


class _OfLastTokens(PooledTrainer):
    """Of models that compute the last tokens alone in place of their output layer."""

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        batch = next(batches)
        assert isinstance(batch, PooledBatch)
        with at_last_tokens(batch.ends):
            return super().forward_step(iter([batch]), model)

    def pooled(self, batch: PooledBatch, outputs: Tensor) -> Tensor:
        """outputs: [1, N, W]"""
        return add_up(self.read(outputs[0]) * batch.held[:, None])

    def read(self, outputs: Tensor) -> Tensor:
        """What counts of outputs [N, W]."""
        return outputs


class GenerativeRerankerTrainer(_OfLastTokens, RerankerTrainer):
    """... of how much likelier than `no` the word `yes` is as the answer, in logits."""

    def see(self, data: Data) -> None:
        super().see(data)
        assert isinstance(data[0], GroupDataset)
        self.words = data[0].words

    def setup(self, run: Run) -> None:
        super().setup(run)
        for model in self.models:
            judge_last_tokens(unwrap(model))

    def read(self, outputs: Tensor) -> Tensor:
        """[N, 1] of logits [N, V]. Collective."""
        rows = outputs.shape[-1]
        words = torch.tensor(self.words, device=outputs.device)
        mine = words // rows == mpu.get_tensor_model_parallel_rank()
        # Gradients go back on ranks that have neither word, too: what follows is collective.
        found = torch.where(mine, outputs[:, words % rows].float(), 0.0)
        yes, no = reduce_from_tensor_model_parallel_region(found).unbind(1)
        return (yes - no)[:, None]


class EmbeddingTrainer(_OfLastTokens):
    """The loss of texts as vectors; see VectorLoss. Its batch is the micro batch of all data-parallel ranks."""

    loader = GroupLoader
    counted = "rows"

    def see(self, data: Data) -> None:
        self.vector_loss = VectorLoss.of(self.args, self.args.loss_type or self.args.loss_types[0])
        self.sums = self.vector_loss.names
        if self.parallel.rank == 0:
            self.chat = SentenceFiles(self.args.description.hidden_size, self.args.max_length)

    def _vectors(self, batch: PooledBatch, outputs: Tensor) -> Vectors:
        rows, roles, labels = batch.targets.unbind(1)
        first = torch.cat([rows.new_ones(min(len(rows), 1)), rows.diff()]) > 0
        return Vectors(outputs, rows.long(), roles.long(), labels[first])

    def count(self, batch: PooledBatch) -> float:
        return float(len(batch.targets[:, 0].unique()))

    def judge(self, batch: PooledBatch, outputs: Tensor) -> dict[str, Tensor]:
        return self.vector_loss.sums(self._vectors(batch, outputs), mpu.get_data_parallel_group())

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.vector_loss.metrics(sums)


def trainer_of(task_type: str | None) -> type[PooledTrainer]:
    """That of a task of groups."""
    kinds = {
        "reranker": RerankerTrainer,
        "generative_reranker": GenerativeRerankerTrainer,
        "embedding": EmbeddingTrainer,
    }
    return kinds[str(task_type)]
