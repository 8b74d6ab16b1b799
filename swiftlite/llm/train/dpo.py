"""`swiftlite dpo` (`rlhf --rlhf_type dpo`): direct preference optimisation with transformers, all parameters or LoRA.

The reference is the model as training began, --ref_model, or with LoRA the model with its adapters off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from swiftlite.arguments.preference import DpoArguments
from swiftlite.checkpoint.resolve import as_arguments
from swiftlite.llm.dataset.pairs import SIDES, PairDataset, sequences_of
from swiftlite.llm.dataset.prepare import load_pairs
from swiftlite.llm.model.loader import embedding_rows
from swiftlite.llm.model.tuner import prepare_model
from swiftlite.llm.pipeline import load_model
from swiftlite.llm.train.begin import started
from swiftlite.llm.train.trainer import HfTrainer, run
from swiftlite.train.checkpoints import Start
from swiftlite.train.dpo_loss import LogProbs, PairLoss, answer_log_probs
from swiftlite.train.objective import Batch
from swiftlite.train.reference import check_reference, pair_loss, reference_kind
from swiftlite.utils.dist import all_gather
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template
    from swiftlite.llm.train.ulysses import SequenceParts

logger = get_logger()

# What a batch holds besides the model's inputs.
_NOT_INPUTS = ("labels", "sequence_ids", "reference", "answers")


class PairCollator:
    """Items of a PairDataset -> one batch: all chosen answers, then all rejected ones; rows, or joined to one sequence.

    Returns: input_ids, labels, position_ids, attention_mask [2P, S] (joined: [1, S], without a mask); sequence_ids, which
    answer a position belongs to, int64 of the same shape; answers, 2P; reference [2P], where it was computed before.
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def __call__(self, items: Sequence[Json]) -> Batch:
        rows = sequences_of(items)
        batch: Batch = self.template.data_collator(rows)
        if self.template.padding_free:
            sizes = torch.tensor([len(row["input_ids"]) for row in rows])
            ids = torch.repeat_interleave(torch.arange(len(rows)), sizes)
            batch["sequence_ids"] = pad(ids, (0, batch["labels"].shape[1] - len(ids))).unsqueeze(0)
        else:
            batch["sequence_ids"] = torch.arange(len(rows)).unsqueeze(1).expand_as(batch["labels"]).contiguous()
        batch["answers"] = torch.tensor(len(rows))
        known = [pair.get("reference") for item in items for pair in item["pairs"]]
        if all(values is not None for values in known):
            batch["reference"] = torch.tensor(list(zip(*known, strict=True)), dtype=torch.float32).flatten()
        return batch


def pair_lengths(item: Json) -> list[int]:
    """Tokens of each answer with its prompt."""
    return [len(pair[side]["input_ids"]) for pair in item["pairs"] for side in SIDES]


def log_probs(model: torch.nn.Module, batch: Batch) -> LogProbs:
    """Of the answers in a batch under a model."""
    logits = model(**{name: value for name, value in batch.items() if name not in _NOT_INPUTS}).logits
    return answer_log_probs(logits, batch["labels"], batch["sequence_ids"], int(batch["answers"]))


class Preference:
    """The objective of a pair loss. reference: a model; None: the policy with its adapters off, if the loss has one."""

    counts: tuple[str, ...] = ("pairs", "chosen_tokens")

    def __init__(
        self, loss: PairLoss, policy: PreTrainedModel, reference: PreTrainedModel | None, has_reference: bool = True
    ) -> None:
        self.pair_loss, self.policy = loss, policy
        self.reference = reference
        self.has_reference = has_reference
        self.parts: SequenceParts | None = None

    def count(self, batch: Batch) -> list[int]:
        pairs = int(batch["answers"]) // 2
        answered = batch["labels"][:, 1:] != -100
        return [pairs, int((answered & (batch["sequence_ids"][:, 1:] < pairs)).sum())]

    def sums(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        policy = self.log_probs(model, batch)
        sums = self.pair_loss.sums(policy, self.reference_log_probs(batch, policy) if self.has_reference else None)
        return {name: value / self.parts.size for name, value in sums.items()} if self.parts else sums

    def log_probs(self, model: torch.nn.Module, batch: Batch) -> LogProbs:
        """Of whole answers, whose parts may be on several ranks."""
        found = log_probs(model, batch)
        return LogProbs(self.parts.add_up(found.sums), self.parts.add_up(found.tokens)) if self.parts else found

    def loss(self, sums: dict[str, Tensor]) -> Tensor:
        return self.pair_loss.total(sums["loss"], sums["pairs"], sums["nll"], sums["chosen_tokens"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return self.pair_loss.metrics(sums)

    @torch.no_grad()
    def reference_log_probs(self, batch: Batch, policy: LogProbs | None = None) -> LogProbs:
        if policy is not None and "reference" in batch:
            return LogProbs(batch["reference"], policy.tokens)
        if self.reference is not None:
            return self.log_probs(self.reference, batch)
        with _frozen(cast("PeftModel", self.policy)):
            return self.log_probs(self.policy, batch)


@contextmanager
def _frozen(model: PeftModel) -> Iterator[None]:
    """A LoRA model without its adapters and without dropout."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(training)


def reference_model(args: DpoArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """The frozen reference before `model` is changed; None where adapters are switched off, or the loss has none.

    Raises: UsageError as reference_kind, check_reference.
    """
    kind = reference_kind(args)
    if kind in ("none", "adapters off"):
        return None
    reference: PreTrainedModel
    if kind == "start":
        # Ranks that divide it share the memory of what is read, not of a copy.
        reference = load_model(args) if args.fsdp else copy.deepcopy(model)
    else:
        from swiftlite.llm.model.loader import get_model_tokenizer

        reference, _ = get_model_tokenizer(
            str(args.ref_model), args.model_info.torch_dtype, args.device_map, use_hf=args.use_hf, need_template=False,
            attn_impl=args.hf_attn_implementation, trust_remote_code=args.trust_remote_code, hub_token=args.hub_token,
            ignore_requirements=args.ignore_requirements, new_special_tokens=args.new_special_tokens,
        )  # fmt: skip
        check_reference(args, embedding_rows(reference), embedding_rows(model))
    if not args.adapts:
        _round_like_trained(reference)
    for config in (reference.config, reference.config.get_text_config()):
        config.use_cache = False
    return reference.requires_grad_(False).eval()


def _round_like_trained(reference: PreTrainedModel) -> None:
    """The policy's weights are held in fp32 and its matrices run by autocast; equal weights must give equal numbers here.

    So everything but the matrices is held in fp32 as well; those are rounded to what autocast makes of the policy's.
    """
    matrices = {id(m.weight) for m in reference.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in reference.parameters():
        is_matrix = id(parameter) in matrices or parameter.dim() == 3
        if parameter.dtype in (torch.bfloat16, torch.float16) and not is_matrix:
            parameter.data = parameter.data.float()


class DpoTrainer(HfTrainer):
    """The engine with a reference model next to it, or with what that said before training."""

    objective: Preference

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.references = int(self.args.has_reference and not self.args.precompute_ref_log_probs)

    def load(self, start: Start | None) -> int:
        self.objective.parts = self.parts
        done = super().load(start)
        if self.objective.reference is not None:
            self.place(self.objective.reference)
            if self.parts is not None:
                self.parts.install(self.objective.reference)
        if self.args.precompute_ref_log_probs:
            for dataset in (self.run.train_set, self.run.val_set):
                if isinstance(dataset, PairDataset):
                    self.precompute(dataset)
            self.objective.reference = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done

    @torch.no_grad()
    def precompute(self, dataset: PairDataset) -> None:
        """Keep the reference's log-probabilities of all pairs; ranks share the work. Collective."""
        plan = self.run.plan
        mine, size = range(plan.dp_rank, dataset.pairs, plan.dp_size), plan.micro_batch_size
        found: list[tuple[int, float, float]] = []
        for start in range(0, -(-dataset.pairs // plan.dp_size), size):
            indices = mine[start : start + size]  # perhaps none: ranks run a sharded model together
            batch = self.inputs(self.collate([{"pairs": [dataset.pair(i) for i in indices or [0]]}]))
            with self.accelerator.autocast():
                sums = self.objective.reference_log_probs(batch).sums
            found += zip(indices, *(part[: len(indices)].tolist() for part in sums.chunk(2)), strict=True)
        everybody = sorted({entry for part in all_gather(found) for entry in part})
        dataset.reference = [(chosen, rejected) for _, chosen, rejected in everybody]
        logger.info("the reference answered %d pairs", dataset.pairs)


def dpo_main(args: DpoArguments | Sequence[str]) -> Json:
    """Train on preference pairs; the same command again resumes where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can fix.
    """
    args = as_arguments(DpoArguments, args)
    with started(args, load_pairs) as (model, template, data, start):
        reference = reference_model(args, model)
        transformers.set_seed(args.seed)  # adapters begin the same on all ranks
        model = prepare_model(model, args)
        objective = Preference(pair_loss(args), model, reference, args.has_reference)
        return run(DpoTrainer(args, model, template, objective, PairCollator(template), pair_lengths), data, start)
