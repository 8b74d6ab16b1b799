"""The training loop on megatron-core, shared by all trainers: model, optimizer, schedule, steps, evaluation, saving.

A subclass says what a forward pass computes (`forward_step`); everything else is here.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from swiftlite.checkpoint.side_files import MANIFEST, MEGATRON_LM_ARGS, read_manifest, write_manifest
from swiftlite.convert.adapters import CONFIG as ADAPTER_CONFIG
from swiftlite.convert.adapters import merge_to_hf, open_adapter, write_peft
from swiftlite.convert.origin import Origin
from swiftlite.llm.dataset.order import order_of, read_data_state, steps_of, write_data_state
from swiftlite.llm.template.trained import Chat
from swiftlite.megatron import backend
from swiftlite.megatron import state as checkpoint
from swiftlite.megatron.background import BackgroundWriter
from swiftlite.megatron.distributed import ParallelState
from swiftlite.megatron.hf_io import load_weights, prepare_hf_weights
from swiftlite.megatron.model.blocks.router import set_router_losses
from swiftlite.megatron.model.config import to_transformer_config, torch_dtype, virtual_stages
from swiftlite.megatron.model.experts import gathers
from swiftlite.megatron.model.provider import build_models
from swiftlite.megatron.state import Position
from swiftlite.megatron.trainers.batch import BatchLoader, BatchPlan, MicroBatch, evaluation_samples
from swiftlite.megatron.trainers.graphs import StepGraphs, own_stream
from swiftlite.megatron.trainers.graphs import obstacle as graph_obstacle
from swiftlite.megatron.trainers.loss import reduce_over_ranks
from swiftlite.megatron.trainers.narration import HF_SUFFIX, say_end, say_start
from swiftlite.megatron.trainers.optimizer import agree_on_loss_scale, build_optimizer, build_scheduler, leave_headroom
from swiftlite.megatron.trainers.wrapping import wrap_models
from swiftlite.megatron.tuners.freeze import freeze_parameters, trained_weights
from swiftlite.megatron.tuners.lora import LoraPlan, prepare_lora
from swiftlite.train.checkpoints import Record, Start
from swiftlite.train.flops import ModelFlops, attention_pairs, flops_of
from swiftlite.train.fp16 import LOWEST_SCALE, say_skipped
from swiftlite.train.intervals import Best, Rhythm, names_of
from swiftlite.train.meters import StepMeter, device_peak
from swiftlite.train.metrics import Metrics, check_finite
from swiftlite.train.stop import StopSignal, say_how_to_go_on
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import format_bytes, move_files, write_json, write_text_atomic
from swiftlite.utils.logger import get_logger

logger = get_logger()

_RUN_FILES = ".run-files.saving"  # of a run's own directory, while they are made


class Trainer:
    """One run. Use: `Trainer(args, parallel, train_set, val_set, pad_token_id).train()`.

    Args:
        args: MegatronSftArguments with model, dtype and output directory settled.
        train_set, val_set: EncodedDatasets; val_set None: no evaluation.
        origin: directory of the weights that the run starts from, either format.
    """

    def __init__(
        self, args: Any, parallel: ParallelState, train_set: Any, val_set: Any, pad_token_id: int, origin: str | Path
    ) -> None:
        self.args, self.parallel, self.origin_dir = args, parallel, Path(origin)
        self.root = Path(args.output_dir)
        micro, accumulation, self.global_batch_size = args.batch_sizes(parallel.dp_size)
        self.plan = BatchPlan(micro, accumulation, parallel.dp_rank, parallel.dp_size)
        stages = virtual_stages(args)
        if stages and accumulation % parallel.pp_size:
            raise UsageError(
                f"{accumulation} micro batches a step: with --num_virtual_stages_per_pipeline_rank {stages} they must "
                f"be a multiple of --pipeline_model_parallel_size {parallel.pp_size}"
            )
        self.train_iters = steps_of(train_set, args, self.global_batch_size)
        self.train_set, self.order = train_set, order_of(train_set, args, self.global_batch_size)
        per_epoch = None if self.order.num_samples is None else self.order.num_samples / self.global_batch_size
        self.rhythm = Rhythm(args, self.train_iters, per_epoch, val_set is not None)
        measured = names_of(self.metrics) if val_set is not None else None
        self.best = Best(self.root, args.metric_for_best_model, args.greater_is_better, measured)
        self.record = Record(self.root)
        self.evaluation: dict[str, float] = {}
        multiple = parallel.tp_size if args.sequence_parallel else 1
        self.device = backend.setup().device
        # Stages tell each other the shapes of what they send, but not in an interleaved pipeline: one length there.
        self.variable_lengths = parallel.pp_size > 1 and stages is None
        self.joins = bool(args.packing or args.padding_free)
        # All but the all-to-all of chosen tokens exchange as many tokens as one rank has, taking others to have the same.
        even = args.moe_token_dispatcher_type != "alltoall" or args.moe_pad_expert_input_to_capacity
        even = even or (parallel.ep_size > 1 and gathers(args, to_transformer_config(args)))
        group = mpu.get_data_parallel_group() if even and parallel.ep_size > 1 else None
        # Packed sequences are nearly full; filled up they have one shape, which can be captured.
        fills = args.packing and self.device.type == "cuda" and args.cuda_graph is not False
        room = args.max_length * micro if fills else 0
        options = (pad_token_id, multiple, self.device, stages is not None, self.joins, group, room)
        self._settle_overlap()
        self.train_loader = self.loader(train_set, *options)
        self.ahead: tuple[int, list[MicroBatch]] | None = None  # batches made early: the first sample, they
        self.val_size = len(val_set) if val_set is not None else 0
        self.val_loader = self.loader(val_set, *options)
        self.position = Position()
        self.stopped = False  # by a signal, before the last step
        self.written: list[Path] = []
        self.models: list[Any] = []
        # Losses are sums over tokens, so a first scale that fits depends on the batch: its first step is tried again.
        self.scale_is_found = torch_dtype(args) != torch.float16
        self.chat: Chat | None = None  # what directories that are written tell of it, on rank 0
        self.lora: LoraPlan | None = None  # of a run that trains adapters
        self.trained: set[str] | None = None  # Hugging Face names, of a run that leaves some as they are
        self.writer = BackgroundWriter(self.device)
        self.graphs: StepGraphs | None = None

    def _settle_overlap(self) -> None:
        """Collectives of data parallelism run beside the passes by default where they have streams of their own.

        Adapters are gathered at once: they are small, and those of grouped experts are read outside their own modules,
        whose calls would wait for them.
        """
        args = self.args
        beside = self.device.type == "cuda" and self.parallel.dp_size > 1 and self.parallel.pp_size == 1
        if args.overlap_grad_reduce is None:
            args.overlap_grad_reduce = beside
        if args.overlap_param_gather is None:
            args.overlap_param_gather = beside and args.overlap_grad_reduce and args.train_type != "lora"

    # ---- what a subclass says ----

    loader: type[BatchLoader] = BatchLoader
    sums: tuple[str, ...]  # what the loss function reports of a micro batch: scalars, to add up over batches and ranks
    references = 0  # other models that answer the same batches, for the meters

    def divisor(self, batches: list[MicroBatch]) -> Tensor:
        """What the schedule divides a step's gradients by (with per-token loss): a sum over all ranks. Collective."""
        raise NotImplementedError

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """A log line's values from sums over any number of batches; `loss` is one of them."""
        raise NotImplementedError

    def forward_step(self, batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Any]:
        """(output of the model, loss function of that output), as megatron-core's schedules call it."""
        raise NotImplementedError

    # ---- setting up ----

    def setup(self, start: Start | None) -> None:
        """Build model, optimizer and schedule, load the weights or the checkpoint to go on from. Collective."""
        self.origin = Origin(self.origin_dir, self.args.new_tokens)
        models = build_models(self.args, variable_seq_lengths=self.variable_lengths)
        if self.args.train_type == "lora":
            self.lora = prepare_lora(models, self.origin, self.args)
        else:
            self.trained = freeze_parameters(models, self.origin.bound, self.args)
        self.router_losses = set_router_losses(models, self.args)
        self.models = wrap_models(models, self.args)
        self.config: Any = get_model_config(self.models[0])
        if start is None or self.lora:
            read = load_weights(self.models, self.origin, self.args.allow_overflow)
            logger.info("loaded %s from %s on this rank", format_bytes(read), self.origin_dir)
        self.optimizer = build_optimizer(self.models, self.args)
        self.optimizer.reload_model_params()
        self.scheduler = build_scheduler(self.optimizer, self.args, self.train_iters, self.global_batch_size)
        if start is not None:
            with start.reading():
                self.position = checkpoint.load_checkpoint(
                    start.directory, self.models, self.args, self.optimizer, self.scheduler
                )
            self.scale_is_found |= not self.args.no_save_optim
            logger.info("going on from step %d in %s", self.position.iteration, self.root)
        self.carried = {} if self.lora else checkpoint.carried_tensors(self.models, self.origin)
        if self.carried:
            logger.info("%d tensors that training does not hold go unchanged into every checkpoint", len(self.carried))
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if self.args.overlap_grad_reduce:
            no_sync: list[Any] = [model.no_sync for model in self.models]
            self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self.forward_backward = get_forward_backward_func()
        self.graphs = StepGraphs(graph_obstacle(self.args, self.models, self.device))

    def write_run_files(self) -> None:
        """Config, tokenizer, manifest and arguments beside the checkpoints, before the first one. Rank 0 only."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.args.save(self.root)  # first: it says whose directory this is, to the same command after a failed start
        beside = self.root / _RUN_FILES
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        self.origin.write_side_files(beside, None if self.lora else torch_dtype(self.args))
        manifest = read_manifest(self.origin.root)
        if manifest is not None:
            write_json(beside / MANIFEST, manifest)
        elif hasattr(self.origin.source, "tensors"):  # of a model directory
            shapes = {name: tensor.spec.shape for name, tensor in self.origin.source.tensors.items()}
            coverage = self.origin.bound.check(shapes, str(self.origin_dir))
            write_manifest(beside, self.origin.source, coverage)
        lm_args = self.args.megatron_lm_args()
        text = lm_args if isinstance(lm_args, str) else shlex.join(lm_args) + "\n"
        write_text_atomic(beside / MEGATRON_LM_ARGS, text)
        if self.lora:
            write_json(beside / ADAPTER_CONFIG, self.lora.peft_config)
        self._record(beside)
        move_files(beside, self.root)

    def _record(self, directory: Path, base: Path | None = None) -> None:
        """Beside copied files of the model (or of those in `base`): arguments, the chat that was trained. Rank 0 only."""
        self.args.save(directory)
        if self.chat is not None:
            self.chat.write(directory, base)

    # ---- running ----

    def run_batches(self, batches: list[MicroBatch], forward_only: bool) -> Tensor:
        """Forward (and backward) passes over this rank's micro batches. Returns: `sums` [n], 0 before the last stage."""
        if self.router_losses and not forward_only:
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
        self, models: list[Any], batches: list[MicroBatch], forward_step: Any, forward_only: bool
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
            seq_length=max(batch.tokens.shape[1] for batch in batches),
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
        return results

    def train_step(self) -> tuple[dict[str, float], dict[str, float]]:
        """One optimizer step. Returns: loss, lr and grad_norm; what StepMeter adds up, `sums` among it."""
        start = self.position.consumed_samples
        began = time.perf_counter()
        early, self.ahead = self.ahead, None
        batches = early[1] if early and early[0] == start else self._load(start)
        data_seconds = time.perf_counter() - began
        lr = next(group["lr"] for group in self.optimizer.param_groups if group.get("lr") is not None)
        total, updated, grad_norm, scale = self._update(batches)
        if not updated and not self.scale_is_found:
            while not updated and scale > LOWEST_SCALE:
                total, updated, grad_norm, scale = self._update(batches)
            leave_headroom(self.optimizer)
        self.scale_is_found = True
        if updated:
            self.scheduler.step(increment=self.global_batch_size)
        attended = sum(attention_pairs(b.sample_lengths) for b in batches)
        counts = torch.tensor(
            [sum(b.num_tokens for b in batches), sum(b.tokens.numel() for b in batches), attended], device=self.device
        )
        reduced = reduce_over_ranks(torch.cat([total, self._once(counts)])).tolist()
        names = (*self.sums, "tokens", "padded_tokens", "pairs_attended")
        sums = dict(zip(names, reduced, strict=True), samples=self.global_batch_size, data_s=data_seconds)
        self.position = Position(self.position.iteration + 1, start + self.global_batch_size)
        values = {"loss": self.metrics(sums)["loss"], "lr": lr}
        check_finite(self.position.iteration, {"loss": values["loss"], "gradient norm": float(grad_norm or 0.0)})
        if updated:
            values["grad_norm"] = float(grad_norm or 0.0)
        if self.config.fp16:
            skipped = self.position.iteration - self.scheduler.num_steps // self.global_batch_size
            values.update(loss_scale=scale, skipped_steps=skipped)
            if not updated:
                say_skipped(self.position.iteration, scale, skipped)
        return values, sums

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
        self._make_ahead()
        updated, grad_norm, _ = self.optimizer.step()
        if self.args.overlap_param_gather:
            self._gather_anew()
        agree_on_loss_scale(self.optimizer)
        return total, updated, grad_norm, scale

    def _load(self, start: int) -> list[MicroBatch]:
        """This rank's batches of the step that begins with sample `start`."""
        samples = self.order.slice(start, start + self.global_batch_size)
        return self.train_loader.load(self.plan.micro_batches(samples))

    def _make_ahead(self) -> None:
        """Make the next step's batches while the device computes this one's. A stream's place stays with the step."""
        stop = self.position.consumed_samples + self.global_batch_size
        wanted = self.device.type == "cuda" and not getattr(self.train_set, "is_streaming", False)
        if wanted and self.ahead is None and self.position.iteration + 1 < self.train_iters:
            self.ahead = stop, self._load(stop)

    def _gather_anew(self) -> None:
        """A replayed step leaves the marks of DDP as they were, so they say that the new parameters were gathered."""
        for model in self.models:
            for group in (*model.bucket_groups, *model.expert_parallel_bucket_groups):
                group.param_gather_dispatched = False

    def _once(self, counts: Tensor) -> Tensor:
        """Counts of the last stage only: every stage sees the same samples."""
        return counts.float() if self.parallel.is_last_stage else torch.zeros_like(counts, dtype=torch.float32)

    def evaluate(self) -> dict[str, float]:
        """Means over the validation set; samples in a last, partial batch count like all others."""
        for model in self.models:
            model.eval()
        total = torch.zeros(len(self.sums), device=self.device)
        with torch.no_grad():
            for samples in evaluation_samples(self.val_size, self.global_batch_size, self.args.eval_iters):
                batches = self.val_loader.load(self.plan.micro_batches(samples))
                total += self.run_batches(batches, forward_only=True)
        for model in self.models:
            model.train()
        sums = dict(zip(self.sums, reduce_over_ranks(total).tolist(), strict=True))
        return {f"eval_{name}": value for name, value in self.metrics(sums).items()}

    def train(self, start: Start | None = None) -> dict[str, Any]:
        """The whole run, from a checkpoint on or from its beginning.

        Returns: what it ended with (loss, steps, seconds, files). Collective.
        """
        with own_stream(self.device):
            return self._train(start)

    def _train(self, start: Start | None) -> dict[str, Any]:
        if start is not None:
            start.check(checkpoint.check_file)
            read_data_state(self.train_set, start.directory)
        self.setup(start)
        say_start(self)
        main = self.parallel.rank == 0
        if main:
            self.write_run_files()
        torch.distributed.barrier()
        metrics = Metrics(
            self.root, self.args.logging_dir, self.args.report_to, self.position.iteration, self.train_iters, main,
            self.args.to_dict(),
        )  # fmt: skip
        backend.reset_peak_memory()
        began = time.perf_counter()
        try:
            with StopSignal() as stop:
                last = self._steps(metrics, stop)
        finally:
            metrics.close()
        seconds = time.perf_counter() - began
        plot = metrics.plot()
        if plot is not None:
            self.written.append(plot)
        say_end(self, seconds, last)
        if self.stopped:
            say_how_to_go_on(self.args, stop)
        return {**last, "iteration": self.position.iteration, "seconds": seconds, "output_dir": str(self.root),
                "signal": stop.sent if self.stopped else None}  # fmt: skip

    def release(self) -> None:
        """Let weights, gradients and process groups go. Hooks on gradients keep DDP in a cycle that Python cannot see."""
        if self.graphs is not None:
            self.graphs.release()
        for model in self.models:
            for parameter in model.parameters():
                parameter.data, parameter.main_grad = parameter.data.new_empty(0), None
            for module in list(model.modules()):  # a cache of megatron-core keeps rotary embeddings, and their group
                vars(module).clear()
        self.models = []

    def _steps(self, metrics: Metrics, stop: StopSignal) -> dict[str, float]:
        last: dict[str, float] = {}
        flops = flops_of(self.args.model_info.config, self.args.mtp_num_layers or 0)
        meter = StepMeter(
            flops, self.parallel.world_size, device_peak(str(torch_dtype(self.args)).removeprefix("torch.")),
            backend.peak_memory_bytes, references=self.references, **self._trained_weights(flops),
        )  # fmt: skip
        while self.position.iteration < self.train_iters:
            values, sums = self.train_step()
            step = self.position.iteration
            stopping = stop.agreed(self.device)
            self.writer.finish()
            meter.add(sums)
            metrics.advance(step, values["loss"], values["lr"], values.get("grad_norm", 0.0))
            if stopping and step < self.train_iters:
                logger.warning("%s: saving step %d of %d, then ending", stop.sent.name, step, self.train_iters)
            if self.rhythm.logs(step) or stopping:
                last = {**values, **self.metrics(meter.sums()), **meter.summary()}
                metrics.log(step, last)
            self.evaluation = {}
            if self.rhythm.evaluates(step):
                self.evaluation = self.evaluate()
                metrics.log(step, self.evaluation)
                meter.restart_clock()
            if self.rhythm.saves(step) or stopping:
                self.save()
                meter.restart_clock()
            if stopping:
                self.stopped = step < self.train_iters
                break
        self.writer.finish(wait=True)
        return last

    def _trained_weights(self, flops: ModelFlops | None) -> dict[str, Any]:
        """`trained` and `adapters` of ModelFlops.training."""
        share = flops.expert_share if flops else 1.0
        if self.lora:
            return {"trained": 0.0, "adapters": self.lora.met_weights(self.origin.bound, share)}
        return {"trained": trained_weights(self.origin.bound, self.trained, share) if self.trained else None}

    def save(self) -> None:
        """Write a checkpoint, and the Hugging Face directory if asked for; delete what is above the limit. Collective.

        Checkpoints of adapters have them in PEFT's format too.
        """
        weights_only, lora, samples = self.args.no_save_optim, self.lora, self.position.consumed_samples
        self.writer.finish(wait=True)
        if self.args.overlap_param_gather:  # or other ranks' parts would be those before the last step
            for model in self.models:
                model.start_param_sync(force_sync=True)
        path, write = checkpoint.prepare_checkpoint(
            self.root, self.position, self.models, self.args,
            None if weights_only else self.optimizer, self.scheduler, self.carried,
            self._write_adapter if lora else None,
            lambda directory: write_data_state(self.train_set, directory, samples), self.args.async_save,
        )  # fmt: skip
        written, writes = [path], [write]
        if self.args.save_safetensors and not lora:
            hf_dir = self.root / f"{path.name}{HF_SUFFIX}"
            writes.append(prepare_hf_weights(self.models, hf_dir, self.origin, record=self._record)[1])
            written.append(hf_dir)
        saved = partial(self._saved, written, self.position.iteration, self.evaluation)
        if self.args.async_save:
            self.writer.start(writes, saved)
            return
        for write in writes:
            write.run()
        saved()

    def _write_adapter(self, directory: Path) -> None:
        """The adapter in PEFT's format beside a checkpoint that is being written, and what it was trained with."""
        assert self.lora is not None
        write_peft(directory, self.lora.peft_config, directory, self.origin)
        self._record(directory, self.origin.root)

    def _saved(self, written: list[Path], iteration: int, evaluation: dict[str, float]) -> None:
        """A checkpoint has become valid: only now it counts for the best one and for the limit. Collective."""
        if self.lora and self.args.merge_lora:
            hf_dir = self.root / f"{written[0].name}{HF_SUFFIX}"
            with tempfile.TemporaryDirectory() as scratch:
                adapter = open_adapter(written[0], self.origin.bound, Path(scratch), plain=False)
                merge_to_hf(
                    self.origin_dir, adapter, hf_dir, torch_dtype(self.args), self.args.new_tokens,
                    record=self._record, exist_ok=True, allow_overflow=self.args.allow_overflow,
                )  # fmt: skip
            written = [*written, hf_dir]
        deleted: list[Path] = []
        if self.parallel.rank == 0:
            if self.best.saved(iteration, written[0].name, evaluation):
                logger.info("best so far: %s", self.best.record)
            deleted = self.record.saved(written, self.args.save_total_limit, self.best.checkpoint)
            logger.info("saved %s", " and ".join(str(p) for p in written))
        self.written = [p for p in self.written + written if p not in deleted]
