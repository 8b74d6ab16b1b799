"""The engine on megatron-core, shared by all commands: it builds, steps, evaluates, saves; train.loop says when.

A subclass says what a forward pass computes (`forward_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.chat import Beside
from swiftlite.megatron import backend
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.background import BackgroundWriter
from swiftlite.megatron.distributed import ParallelState
from swiftlite.megatron.state import Position
from swiftlite.megatron.trainers.batch import BatchLoader, MicroBatch
from swiftlite.megatron.trainers.build import build, variable_lengths
from swiftlite.megatron.trainers.graphs import StepGraphs, own_stream
from swiftlite.megatron.trainers.graphs import obstacle as graph_obstacle
from swiftlite.megatron.trainers.loss import LossFunction, reduce_over_ranks
from swiftlite.megatron.trainers.optimizer import agree_on_loss_scale, can_go_down, leave_headroom
from swiftlite.megatron.trainers.saving import RunFiles
from swiftlite.train.batches import StepBatches, evaluation_samples
from swiftlite.train.checkpoints import Start
from swiftlite.train.flops import ModelFlops, pairs_of
from swiftlite.train.loop import Run, Step

# What megatron-core's schedules call: (output of the model, loss function of that output) of the next batch.
ForwardStep = Callable[[Iterator[MicroBatch], torch.nn.Module], tuple[Tensor, LossFunction]]


@contextmanager
def evaluating(models: Sequence[MegatronModule]) -> Iterator[None]:
    """Without dropout."""
    training = models[0].training
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train(training)


class Trainer:
    """One model in training, see swiftlite.train.loop.Engine.

    Args:
        args: MegatronSftArguments with model, dtype and output directory settled.
        origin: directory of the weights that the run starts from, either format. chat: what was trained, on rank 0.
    """

    def __init__(
        self,
        args: MegatronSftArguments,
        parallel: ParallelState,
        pad_token_id: int,
        origin: str | Path,
        chat: Beside | None = None,
    ) -> None:
        self.args, self.parallel = args, parallel
        self.pad_token_id = pad_token_id
        self.origin_dir, self.chat = Path(origin), chat
        self.device = backend.setup().device
        self.position = Position()
        self.models: list[MegatronModule] = []
        # Losses are sums over tokens, so a first scale that fits depends on the batch: its first step is tried again.
        self.scale_is_found = False
        self.writer = BackgroundWriter(self.device)
        self.graphs: StepGraphs | None = None
        self.held = ExitStack()

    # ---- what a subclass says ----

    loader: type[BatchLoader] = BatchLoader
    # What the loss function reports of a micro batch: scalars, to add up over batches and ranks. Evaluations may have more.
    sums: tuple[str, ...]
    references = 0  # other models that answer the same batches, for the meters

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        """What the schedule divides a step's gradients by (with per-token loss): a sum over all ranks. Collective."""
        raise NotImplementedError

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """A log line's values from sums over any number of batches; `loss` is one of them."""
        raise NotImplementedError

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        """(output of the model, loss function of that output), as megatron-core's schedules call it."""
        raise NotImplementedError

    def see(self, data: tuple[Any, Any]) -> None:  # as train.order.Data
        """What a run trains on and evaluates with, before anything else."""

    # ---- setting up ----

    def setup(self, run: Run) -> None:
        self.held.enter_context(own_stream(self.device))
        self.run, self.root = run, run.root
        args = self.args
        self.variable_lengths, self.pairs = variable_lengths(args, self.parallel), pairs_of(args.model_info.config)
        micro, passes = run.plan.micro_batch_size, run.plan.num_microbatches
        self.built = build(args, self.parallel, self.origin_dir, self.pad_token_id, run.steps, passes, run.global_batch)
        self.models, self.optimizer = self.built.models, self.built.optimizer
        self.scheduler = self.built.scheduler
        self.files = RunFiles(args, self.built.origin, self.built.lora, self.chat)
        loader = partial(
            self.loader.of, args=args, parallel=self.parallel, micro_batch_size=micro, pad_token_id=self.pad_token_id,
            device=self.device,
        )  # fmt: skip
        self.train_loader = loader(run.train_set)
        self.val_loader = loader(run.val_set) if run.val_set is not None else None
        self.batches = StepBatches(run.plan, run.order, run.steps, self.train_loader.load, self.device)
        self.config: TransformerConfig = get_model_config(self.models[0])
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if args.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.models]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.forward_backward = get_forward_backward_func()
        self.graphs = StepGraphs(graph_obstacle(args, self.models, self.device))

    def load(self, start: Start | None) -> int:
        lora = self.built.lora
        if start is None or lora:
            self.built.load_origin(self.args.allow_overflow)
        if start is not None:
            with start.reading():
                self.position = checkpoint.load_checkpoint(
                    start.directory, self.models, self.args, self.optimizer, self.scheduler
                )
        self.scale_is_found = not self.config.fp16 or (start is not None and not self.args.no_save_optim)
        room = Path(str(self.args.output_dir))
        saves = not (lora or self.args.skip_train)
        self.carried = checkpoint.carried_tensors(self.models, self.built.origin, room) if saves else {}
        return self.position.iteration

    def describe(self) -> Sequence[str]:
        config = self.config
        dtype = str(self.args.model_info.torch_dtype).removeprefix("torch.")
        if self.args.fp8_format:
            dtype += f", products in FP8 ({self.args.fp8_format}, {self.args.fp8_recipe})"
        dispatcher = config.moe_token_dispatcher_type if config.num_moe_experts else "none"
        assert self.graphs is not None
        return (
            backend.setup().describe(),
            f"{self.parallel.describe()}; dtype {dtype}; MoE dispatcher {dispatcher}",
            self.graphs.describe(self.args, config),
        )

    def parameters(self) -> Iterable[Tensor]:
        return (parameter for model in self.models for parameter in model.parameters())

    def trained_weights(self, flops: ModelFlops) -> dict[str, float | None]:
        return self.built.trained_weights(flops)

    def write_run_files(self) -> None:
        self.files.write()

    # ---- a step ----

    def run_batches(self, batches: list[MicroBatch], forward_only: bool) -> Tensor:
        """Forward (and backward) passes over this rank's micro batches. Returns: `sums` [n], 0 before the last stage."""
        if self.built.router_losses and not forward_only:
            self._weigh_router_losses(batches)
        total = torch.zeros(len(self.sums), device=self.device)
        for result in self.passes(self.models, batches, self.forward_step, forward_only):
            total += torch.stack([result[name].float() for name in self.sums])
        return total

    def _weigh_router_losses(self, batches: list[MicroBatch]) -> None:
        """Have each micro batch of the step count the same, whatever its tokens. Collective.

        Without per-token loss gradients are means over the micro batches of all ranks anyway.
        """
        if self.config.calculate_per_token_loss:
            weight = self.divisor(batches).clamp(min=1) / (len(batches) * self.parallel.dp_size)
            for batch in batches:
                batch.router_weight = weight

    def passes(
        self, models: list[MegatronModule], batches: list[MicroBatch], forward_step: ForwardStep, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        """What the loss function reports of each micro batch; nothing on all but the last pipeline stage."""
        iterators: Any = [iter(batches) for _ in models]
        # All stages see the same samples, so they know whether they have to tell each other the shapes.
        several = len({batch.tokens.shape for batch in batches}) > 1
        get_model_config(models[0]).variable_seq_lengths = self.variable_lengths and several
        results: list[dict[str, Tensor]] = self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.shape[1] for batch in batches) * self.parallel.cp_size,
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        return results

    def step(self) -> Step:
        self.writer.finish()
        start = self.position.consumed_samples
        batches, data_seconds = self.batches.take(start)
        lr = next(group["lr"] for group in self.optimizer.param_groups if group.get("lr") is not None)
        total, updated, grad_norm, scale = self._update(batches)
        if not updated and not self.scale_is_found:
            while not updated and can_go_down(scale):
                total, updated, grad_norm, scale = self._update(batches)
            leave_headroom(self.optimizer)
        self.scale_is_found = True
        size = self.run.global_batch
        if updated:
            self.scheduler.step(increment=size)
        self.position = Position(self.position.iteration + 1, start + size)
        sums, stop = self._add_up(total, batches)
        sums.update(samples=size, data_s=data_seconds)
        done = Step(sums, lr, float(grad_norm or 0.0) if updated else None, stop)
        if not self.config.fp16:
            return done
        return replace(done, loss_scale=scale, skipped=self.position.iteration - self.scheduler.num_steps // size)

    def _update(self, batches: list[MicroBatch]) -> tuple[Tensor, bool, float | None, float]:
        """Gradients of a step's batches, and the optimizer's step unless they overflow (fp16).

        Returns: `sums`, whether weights were updated, norm of the gradient, loss scale.
        """
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = float(self.optimizer.get_loss_scale())
        assert self.graphs is not None
        total = self.graphs.run(batches, partial(self.run_batches, forward_only=False))
        self.batches.look_ahead(self.position.consumed_samples + self.run.global_batch)
        updated, grad_norm, _ = self.optimizer.step()
        if self.args.overlap_param_gather:
            self._gather_anew()
        agree_on_loss_scale(self.optimizer)
        return total, updated, grad_norm, scale

    def _gather_anew(self) -> None:
        """A replayed step leaves the marks of DDP as they were, so they say that the new parameters were gathered."""
        for model in self.models:
            for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
                group.param_gather_dispatched = False

    def _add_up(self, total: Tensor, batches: list[MicroBatch]) -> tuple[dict[str, float], bool]:
        """Sums over the global batch, and whether any rank was asked to stop: one exchange of all ranks. Collective."""
        attended = sum(self.pairs(b.sample_lengths) for b in batches)
        padded = sum(b.tokens.numel() for b in batches) * self.parallel.cp_size
        counts = [sum(b.num_tokens for b in batches), padded, attended]
        # Every stage sees the same samples, and so does every rank of tensor parallelism and of context parallelism.
        counts_here = self.parallel.is_last_stage and self.parallel.tp_rank == 0
        mine = [*(counts if counts_here and self.parallel.cp_rank == 0 else [0, 0, 0]), self.run.stop.requested]
        sums = total if counts_here else torch.zeros_like(total)
        values = torch.cat([sums.double(), torch.tensor(mine, dtype=torch.float64, device=self.device)])
        torch.distributed.all_reduce(values)
        *found, stop = values.tolist()
        return dict(zip((*self.sums, "tokens", "padded_tokens", "pairs_attended"), found, strict=True)), stop > 0

    def evaluate(self) -> dict[str, float]:
        """Samples in a last, partial batch count like all others."""
        assert self.run.val_set is not None and self.val_loader is not None
        with torch.no_grad(), evaluating(self.models):
            names = self.sums
            total = torch.zeros(len(names), device=self.device)
            for samples in evaluation_samples(len(self.run.val_set), self.run.global_batch, self.args.eval_iters):
                batches = self.val_loader.load(self.run.plan.micro_batches(samples))
                total += self.run_batches(batches, forward_only=True)
        sums = dict(zip(names, reduce_over_ranks(total).tolist(), strict=True))
        return {f"eval_{name}": value for name, value in self.metrics(sums).items()}

    # ---- checkpoints ----

    def save(self, saved: Callable[[list[Path]], None]) -> None:
        """And the Hugging Face directory if it is asked for. Checkpoints of adapters have them in PEFT's format too."""
        self.writer.finish(wait=True)
        if self.args.overlap_param_gather:  # or other ranks' parts would be those before the last step
            for model in self.models:
                model.start_param_sync(force_sync=True)
        path, write = checkpoint.prepare_checkpoint(
            self.root, self.position, self.models, self.args,
            None if self.args.no_save_optim else self.optimizer, self.scheduler, self.carried,
            self.files.write_adapter if self.built.lora else None,
            partial(self.run.write_data_state, self.position.iteration), self.args.async_save,
        )  # fmt: skip
        written, writes = self.files.prepare_hf(self.models, path)
        then = partial(self._saved, [path, *written], saved)
        if self.args.async_save:
            self.writer.start([write, *writes], then)
            return
        for each in (write, *writes):
            each.run()
        then()

    def _saved(self, written: list[Path], saved: Callable[[list[Path]], None]) -> None:
        """A checkpoint has become valid. Collective."""
        saved(written + self.files.merge(written[0]))

    def wait(self) -> None:
        self.writer.finish(wait=True)

    def next_command(self) -> Sequence[object]:
        return self.files.next_command(self.position.iteration)

    def release(self) -> None:
        """Weights, gradients and process groups go. Hooks on gradients keep DDP in a cycle that Python cannot see."""
        if self.graphs is not None:
            self.graphs.release()
        for model in self.models:
            for parameter in model.parameters():
                parameter.data, parameter.main_grad = parameter.data.new_empty(0), None
            for module in list(model.modules()):  # a cache of megatron-core keeps rotary embeddings, and their group
                vars(module).clear()
        self.models = []
        self.held.close()
