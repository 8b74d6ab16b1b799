"""The engine on transformers, on accelerate.Accelerator; swiftlite.train.loop says when it does what.

So that a run equals one on Megatron: the order of samples, a loss that is a mean over the global batch, schedule and
weight decay, fp32 trained weights under autocast. Checkpoints are whole or absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.template.trained import trained_chat
from swiftlite.llm.train.batches import COUNTS, Collate, Lengths, counting
from swiftlite.llm.train.device import accelerator_of, change_layers, place
from swiftlite.llm.train.measure import sums_of
from swiftlite.llm.train.optimization import Optimization
from swiftlite.llm.train.packed import block_diagonal_mask, needs_mask
from swiftlite.llm.train.saving import (
    PREFIX,
    STATE,
    Beside,
    load_model,
    load_rng_state,
    new_directory,
    save_model,
    save_rng_state,
    whole,
)
from swiftlite.llm.train.ulysses import SequenceParts
from swiftlite.train.batches import StepBatches, to_device
from swiftlite.train.checkpoints import Start
from swiftlite.train.loop import Run, Step
from swiftlite.train.objective import Batch, Objective
from swiftlite.train.router_loss import RouterWatch
from swiftlite.utils.dist import get_rank, get_world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from swiftlite.llm.template.base import Template


class HfTrainer:
    """One model in training, see swiftlite.train.loop.Engine.

    Args:
        model: as tuner.prepare_model made it. objective: what is minimised. collate: rows -> a batch.
        lengths: tokens of the samples in a row.
    """

    references = 0

    def __init__(
        self,
        args: SftArguments,
        model: PreTrainedModel,
        template: Template,
        objective: Objective,
        collate: Collate,
        lengths: Lengths,
    ) -> None:
        self.args, self.model = args, model
        self.tokenizer, self.objective = template.tokenizer, objective
        self.template = template
        self.collate = counting(collate, objective, lengths, args.model_info.config)
        self.padding_free = template.padding_free
        self.chat: Beside | None = trained_chat(template) if get_rank() == 0 else None  # rank 0 writes it
        self.state = transformers.TrainerState()
        self.accelerator = accelerator_of(args)
        self.parts: SequenceParts | None = None
        if args.sequence_parallel_size > 1:
            self.parts = SequenceParts(args.sequence_parallel_size, template.padding_side == "right")
        self.device: torch.device = self.accelerator.device
        self.metrics = objective.metrics
        self.counts: Tensor  # of the step's global batch, COUNTS and the objective's
        self.step_sums: dict[str, Tensor] = {}

    # ---- setting up ----

    def setup(self, run: Run) -> None:
        self.run, args = run, self.args
        change_layers(self.model, args)
        self.routers = RouterWatch.of(self.model, args)
        self.bring_model()
        self.optimization = Optimization(self.model, args, self.accelerator, run.steps)
        self.wrapped, self.trained_weights = self.optimization.wrapped, self.optimization.trained_weights
        self.optimizer, self.scheduler = self.optimization.optimizer, self.optimization.scheduler
        self.batches = StepBatches(run.plan, run.order, run.steps, self._load_batches, self.device)
        self.wrapped.train()
        transformers.set_seed(args.seed)

    def bring_model(self) -> None:
        """To where it computes. Collective."""
        self.place(self.model)
        self.masked = self.padding_free and needs_mask(self.model, self.device)
        if self.parts is not None:
            self.parts.install(self.model)

    def place(self, model: PreTrainedModel) -> None:
        """Bring a model to this rank's device, or its share of it. Collective."""
        place(model, self.args, self.accelerator)

    def load(self, start: Start | None) -> int:
        if start is not None:
            with start.reading():
                self._load_from_checkpoint(start.directory)
                self.optimization.load(start)
                load_rng_state(start.directory)
                self.state = transformers.TrainerState.load_from_json(str(start.directory / STATE))
        self.state.max_steps = self.run.steps
        return self.state.global_step

    def describe(self) -> Sequence[str]:
        dtype, attention = self.args.model_info.torch_dtype, self.model.config._attn_implementation
        if self.args.fsdp:
            attention += f"; the model is divided over {get_world_size()} ranks ({' '.join(self.args.fsdp)}, FSDP2)"
        return (f"device {self.device}, dtype {str(dtype).removeprefix('torch.')}, attention {attention}",)

    def parameters(self) -> Iterable[Tensor]:
        return (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())

    def write_run_files(self) -> None:
        """Nothing: each checkpoint has all that belongs to it."""

    # ---- a step ----

    def _load_batches(self, passes: list[list[int]]) -> list[Batch]:
        rows = ([self.run.train_set[i] for i in samples] for samples in passes)
        return [
            {n: v if n == "counts" else to_device(v, self.device) for n, v in self.collate(r).items()} for r in rows
        ]

    def inputs(self, batch: Batch) -> Batch:
        """A batch on the device, with the mask that keeps joined samples apart where the model needs one.

        Of ranks that share sequences, each gets its part.
        """
        there = {name: to_device(value, self.device) for name, value in batch.items() if name != "counts"}
        if self.masked:
            there["attention_mask"] = block_diagonal_mask(there["position_ids"], self.model.dtype)
        return self.parts.divide(there) if self.parts is not None else there

    def step(self) -> Step:
        size, accelerator = self.run.global_batch, self.accelerator
        batches, data_seconds = self.batches.take(self.state.global_step * size)
        self.counts = to_device(torch.stack([batch["counts"] for batch in batches]).sum(0), self.device)
        if get_world_size() > 1:
            torch.distributed.all_reduce(self.counts)
            self.counts /= self.args.sequence_parallel_size  # ranks that share sequences count the same
        scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else None
        self.prepare((batch, True) for batch in batches)
        for number, batch in enumerate(batches, 1):
            # A sharded model's gradients never stand whole on a rank.
            added_later = number < len(batches) and not self.args.fsdp
            with accelerator.no_sync(self.wrapped) if added_later else nullcontext():
                accelerator.backward(self.compute_loss(self.wrapped, self.inputs(batch)))
        self.batches.look_ahead((self.state.global_step + 1) * size)
        norm = whole(accelerator.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or math.inf))
        lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        updated = not accelerator.optimizer_step_was_skipped
        if updated:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        sums, length, stop = self.end_step(norm)
        skipped = self.state.global_step - self.scheduler.last_epoch  # the schedule waits in steps that overflow
        return Step({**sums, "data_s": data_seconds}, lr, length if updated else None, stop, scale, skipped)

    def prepare(self, batches: Iterable[tuple[Batch, bool]]) -> None:
        """What else is to be known of this rank's micro batches of a global batch before they run. Collective.

        batches: with whether their samples count.
        """

    def compute_loss(self, model: PreTrainedModel, inputs: Batch) -> Tensor:
        """This micro batch's share of the global batch's loss; ranks' gradients are averaged, hence the factor."""
        if self.routers is not None:
            self.routers.begin(inputs)
        with self.accelerator.autocast():  # for a reference model; the policy has it already
            sums = self.objective.sums(model, inputs)
        for name, value in sums.items():
            if name not in self.objective.counts:
                self.step_sums[name] = self.step_sums.get(name, 0.0) + value.detach().double()
        totals = dict(zip(self.objective.counts, self.counts[len(COUNTS) :], strict=True))
        loss = self.objective.loss({**sums, **totals}) * get_world_size()
        if self.routers is not None:  # a mean over the micro batches of all ranks
            loss = loss + self.routers.total() / self.run.plan.num_microbatches
        return loss

    def end_step(self, norm: Tensor) -> tuple[dict[str, float], float, bool]:
        """(sums over the global batch, norm of the gradient, whether any rank was asked to stop). Collective.

        The device is waited for once.
        """
        names = list(self.step_sums)
        stop = torch.tensor(float(self.run.stop.requested), dtype=torch.float64, device=self.device)
        values = torch.stack([*self.step_sums.values(), stop])
        if get_world_size() > 1:
            torch.distributed.all_reduce(values)
        *found, length = torch.cat([values, self.counts, norm.to(values).view(1)]).tolist()
        self.step_sums = {}
        sums = dict(zip([*names, "stop", *COUNTS, *self.objective.counts], found, strict=True))
        return sums, length, sums.pop("stop") > 0

    def evaluate(self) -> dict[str, float]:
        assert self.run.val_set is not None
        metrics = self.objective.metrics(sums_of(self, self.run.val_set, self.run.plan))
        return {f"eval_{name}": value for name, value in metrics.items()}

    # ---- checkpoints ----

    def save(self, saved: Callable[[list[Path]], None]) -> None:
        """Into a directory of another name, renamed when all of it is there: a killed save leaves no checkpoint."""
        run, step = self.run, self.state.global_step
        target = run.root / f"{PREFIX}{step}"
        with new_directory(target) as beside:
            save_model(self.model, beside, self.args, self.tokenizer, self.chat)
            if not self.args.save_weights_only:
                save_rng_state(beside)
                self.optimization.save(beside)
            if get_rank() == 0:
                self.state.save_to_json(str(beside / STATE))
                run.write_data_state(step, beside)
                self.args.save(beside)
        saved([target])

    def _load_from_checkpoint(self, directory: Path, model: PreTrainedModel | None = None) -> None:
        """Weights or adapters. model: default: the one in training."""
        load_model(self.model if model is None else model, directory, self.args)

    def wait(self) -> None:
        """Nothing: `save` returns when all is on the disk."""

    def next_command(self) -> Sequence[object]:
        args, last = self.args, self.run.root / f"{PREFIX}{self.state.global_step}"
        if args.task_type == "embedding":
            ask = f"SentenceTransformer({str(last)!r}).encode(['text'])"
            return "python", "-c", f"from sentence_transformers import SentenceTransformer; print({ask})"
        if not args.adapts:
            return "swiftlite", "infer", "--model", last, *args.loading_words(hub=False)
        base = ("--model", args.model) if args.model else ()  # an adapter knows its base
        return "swiftlite", "infer", *base, "--adapters", last, *args.loading_words()

    def release(self) -> None:
        self.accelerator.free_memory()
