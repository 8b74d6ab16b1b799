"""The reference model of preference training with transformers, and the engine that has it beside the trained one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from swiftlite.arguments.preference import DpoArguments
from swiftlite.llm.dataset.reference import cached_answers
from swiftlite.llm.model.loader import embedding_rows
from swiftlite.llm.model.tuner import attach_adapter, frozen
from swiftlite.llm.pipeline import load_model, read_model
from swiftlite.llm.train.preference import Compared, answers_batch
from swiftlite.llm.train.trainer import HfTrainer
from swiftlite.train.checkpoints import Start
from swiftlite.train.loop import Run
from swiftlite.train.questions import Questions, asked
from swiftlite.train.reference import check_reference, reference_kind
from swiftlite.utils.dist import all_gather

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        reference, _ = read_model(args, str(args.ref_model))
        check_reference("ref_model", str(args.ref_model), embedding_rows(reference), embedding_rows(model))
    if args.ref_adapters:
        reference = attach_adapter(reference, Path(args.ref_adapters))
    if not args.adapts:
        _round_like_trained(reference)
    return frozen(reference)


def _round_like_trained(reference: PreTrainedModel) -> None:
    """The policy's weights are held in fp32 and its matrices run by autocast; equal weights must give equal numbers here.

    So everything but the matrices is held in fp32 as well; those are rounded to what autocast makes of the policy's.
    """
    matrices = {id(m.weight) for m in reference.modules() if isinstance(m, torch.nn.Linear)}
    for parameter in reference.parameters():
        is_matrix = id(parameter) in matrices or parameter.dim() == 3
        if parameter.dtype in (torch.bfloat16, torch.float16) and not is_matrix:
            parameter.data = parameter.data.float()


class ReferenceTrainer(HfTrainer):
    """The engine with a reference model next to it, or with what that said before training."""

    objective: Compared

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.references = int(self.args.has_reference and not self.args.precompute_ref_log_probs)

    def load(self, start: Start | None) -> int:
        self.objective.parts = self.parts
        done = super().load(start)
        if self.objective.reference is not None:
            self.place(self.objective.reference)
            if self.parts is not None:
                self.parts.install(self.objective.reference)
        if self.args.precompute_ref_log_probs:
            for questions in asked(self.run):
                questions.remember(cached_answers(questions, self.args, partial(self.ask, questions)))
            self.objective.reference = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return done

    @torch.no_grad()
    def ask(self, questions: Questions[object]) -> list[float]:
        """What the reference says to all of them; ranks share the work. Collective."""
        plan, count = self.run.plan, len(questions)
        mine, size = range(plan.dp_rank, count, plan.dp_size), 2 * plan.micro_batch_size  # no gradients need room
        found: list[tuple[int, float]] = []
        for start in range(0, -(-count // plan.dp_size), size):
            indices = mine[start : start + size]  # perhaps none: ranks run a sharded model together
            batch = self.inputs(answers_batch(self.template, [questions[i] for i in indices or [0]]))
            with self.accelerator.autocast():
                sums = self.objective.reference_log_probs(batch).sums
            found += zip(indices, sums[: len(indices)].tolist(), strict=True)
        return [value for _, value in sorted({entry for part in all_gather(found) for entry in part})]
