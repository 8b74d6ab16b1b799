"""The training loop of both sides: it says when; an engine, on megatron-core or on transformers, computes.

`train(run, engine, start)` reads from the top: resume, step, measure, evaluate, save, rotate, stop, summary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from swiftlite.arguments.train import TrainArguments
from swiftlite.train.batches import BatchPlan
from swiftlite.train.checkpoints import Record, Start
from swiftlite.train.flops import ModelFlops, flops_of
from swiftlite.train.fp16 import say_skipped
from swiftlite.train.intervals import Best, Intervals, names_of
from swiftlite.train.meters import StepMeter, device_peak, peak_memory, peak_memory_text
from swiftlite.train.metrics import Metrics, check_finite
from swiftlite.train.order import Dataset, Samples, order_of, read_data_state, steps_of, write_data_state
from swiftlite.train.plugins import CALLBACKS
from swiftlite.train.schedule import warmup_and_decay
from swiftlite.train.stop import StopSignal, say_how_to_go_on
from swiftlite.utils.dist import barrier, get_world_size, is_main_process
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.utils.text import format_seconds
from swiftlite.utils.types import Json, Settings

logger = get_logger()


@dataclass(frozen=True)
class Step:
    """What an optimizer step came to.

    sums: over the global batch; what the engine's `metrics` takes, `tokens`, `padded_tokens`, `samples`, `pairs_attended`;
    `data_s` of this rank. lr: at which it was done. grad_norm: before clipping; None where gradients overflowed, so that
    nothing was updated. stop: some rank was asked to stop. loss_scale, skipped: fp16 only; `skipped` counts such steps.
    """

    sums: dict[str, float]
    lr: float
    grad_norm: float | None
    stop: bool
    loss_scale: float | None = None
    skipped: int = 0


class Engine(Protocol):
    """A model in training. All methods but `metrics` and `next_command` are collective."""

    references: int  # other models that answer the same batches

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """A log line's values from sums over any number of batches; `loss` is one of them. Known before `setup`."""

    def setup(self, run: Run) -> None:
        """Build model, optimizer and schedule."""

    def load(self, start: Start | None) -> int:
        """Load the checkpoint that the run resumes, or what it begins with. Returns: steps done."""

    def describe(self) -> Sequence[str]:
        """Lines for the start of a run: device, precision, kernels."""

    def parameters(self) -> Iterable[torch.Tensor]:
        """Of the model on this rank."""

    def trained_weights(self, flops: ModelFlops) -> Mapping[str, float | None]:
        """`trained` and `adapters` of ModelFlops.training."""

    def write_run_files(self) -> None:
        """What lies next to the checkpoints. Rank 0 only."""

    def step(self) -> Step: ...

    def evaluate(self) -> dict[str, float]:
        """Means over the validation set, or --eval_iters global batches of it, by names with `eval_`."""

    def save(self, saved: Callable[[list[Path]], None]) -> None:
        """Write a checkpoint. saved: called with what was written, on all ranks, as soon as it is valid."""

    def wait(self) -> None:
        """Until all that is being saved is on the disk."""

    def next_command(self) -> Sequence[object]:
        """Words of the command that uses the last checkpoint."""

    def release(self) -> None:
        """Let memory and hooks go; also after an error, wherever it was."""


class Run:
    """What a run consists of besides its model.

    Args: rank, size: of data parallelism. metrics: the engine's. val_set: None: no evaluation.
    Raises: UsageError for settings that do not fit together.
    """

    def __init__(
        self,
        args: TrainArguments,
        train_set: Dataset,
        val_set: Samples | None,
        rank: int,
        size: int,
        metrics: Callable[[dict[str, float]], dict[str, float]],
    ) -> None:
        self.args, self.train_set = args, train_set
        self.val_set = val_set
        self.root = Path(args.output_dir)
        micro, accumulation, self.global_batch = args.batch_sizes(size)
        self.plan = BatchPlan(micro, accumulation, rank, size)
        self.steps = steps_of(train_set, args, self.global_batch)
        self.order = order_of(train_set, args, self.global_batch)
        samples = self.order.num_samples
        self.intervals = Intervals(args, self.steps, samples and samples / self.global_batch, val_set is not None)
        measured = names_of(metrics) if val_set is not None else None
        self.best = Best(self.root, args.metric_for_best_model, args.greater_is_better, measured)
        self.record = Record(self.root)
        self.stop = StopSignal()
        self.stopped = False  # by a signal, before the last step
        self.written: list[Path] = []
        warmup_and_decay(args, self.steps)  # tells now what does not fit

    def saved(self, step: int, evaluation: Mapping[str, float], written: list[Path]) -> None:
        """A checkpoint has become valid: only now it counts for the best one and for the limit."""
        deleted: list[Path] = []
        if is_main_process():
            if self.best.saved(step, written[0].name, evaluation):
                logger.info("best so far: %s, %s", written[0].name, self.best.describe())
            if self.best.is_over(self.args.early_stop_interval):
                self.stop.early = "no better evaluation"
            deleted = self.record.saved(written, self.args.save_total_limit, self.best.checkpoint)
            logger.info("saved %s", " and ".join(map(str, written)))
        self.written = [path for path in self.written + written if path not in deleted]
        for callback in CALLBACKS:
            callback.on_save(self, step, written)

    def write_data_state(self, step: int, directory: Path) -> None:
        """Where the data stands after `step`, into a checkpoint."""
        write_data_state(self.train_set, directory, step * self.global_batch)


def train(run: Run, engine: Engine, start: Start | None) -> Json:
    """The whole run, from its beginning or from a checkpoint; the engine is released at its end. Collective.

    Returns: values of the last log line, `iteration`, `seconds`, `output_dir`, and `signal` if one ended the run.
    """
    args = run.args
    try:
        if start is not None:
            read_data_state(run.train_set, start.directory)
        engine.setup(run)
        done = engine.load(start)
        if start is not None:
            logger.info("resuming from step %d in %s", done, run.root)
        say_started(run, engine)
        if is_main_process():
            run.root.mkdir(parents=True, exist_ok=True)
            args.save(run.root)  # first: it says whose directory this is, to the same command after a failed start
            engine.write_run_files()
        barrier()
        metrics = Metrics(
            run.root, args.logging_dir, args.report_to, done, run.steps, is_main_process(), args.to_dict()
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try:
            with run.stop:
                step, last = _steps(run, engine, metrics, done)
                engine.wait()
        finally:
            metrics.close()
        seconds = time.perf_counter() - began
        plot = metrics.plot()
        run.written += [plot] if plot is not None and last else []
        say_ended(run, engine, step, last, seconds)
        signal = run.stop.ended(run.stopped)
        return {**last, "iteration": step, "seconds": seconds, "output_dir": str(run.root), "signal": signal}
    finally:
        engine.release()


def evaluate(run: Run, engine: Engine) -> Json:
    """The validation losses of the model that training would begin with; nothing is written. Collective.

    Returns: them, by names with `eval_`.
    """
    try:
        engine.setup(run)
        engine.load(None)
        for line in engine.describe():
            logger.info("%s", line)
        began = time.perf_counter()
        found = engine.evaluate()
        seconds = format_seconds(time.perf_counter() - began)
    finally:
        engine.release()
    values = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
    logger.info("%s in %s; peak memory %s", values, seconds, peak_memory_text())
    if is_main_process():
        print(json.dumps(found))  # noqa: T201
    return found


def _steps(run: Run, engine: Engine, metrics: Metrics, done: int) -> tuple[int, dict[str, float]]:
    """All steps after `done`. Returns: the last step, values of the last log line, {} if no step was left to do."""
    step, last = done, dict[str, float]()
    meter = _meter(run, engine)
    for step in range(done + 1, run.steps + 1):
        result = engine.step()
        values = _values(step, result, engine.metrics(result.sums)["loss"])
        meter.add(result.sums)
        metrics.advance(step, values["loss"], values["lr"], values.get("grad_norm", 0.0))
        for callback in CALLBACKS:
            callback.on_step(run, step, values)
        run.stopped = result.stop and step < run.steps
        if run.stopped:
            logger.warning("%s: saving step %d of %d, then ending", run.stop.why, step, run.steps)
        if run.intervals.logs(step) or run.stopped:
            last = {**values, **engine.metrics(meter.sums()), **meter.summary()}
            metrics.log(step, last)
        evaluation: dict[str, float] = {}
        if run.intervals.evaluates(step):
            evaluation = engine.evaluate()
            metrics.log(step, evaluation)
            for callback in CALLBACKS:
                callback.on_evaluate(run, step, evaluation)
            meter.restart_clock()
        if run.intervals.saves(step) or run.stopped:
            engine.save(partial(run.saved, step, evaluation))
            meter.restart_clock()
        if run.stopped:
            break
    return step, last


def _meter(run: Run, engine: Engine) -> StepMeter:
    flops = flops_of(run.args.model_info.config, getattr(run.args, "mtp_num_layers", None) or 0)
    if flops is None:
        logger.info("config.json does not tell the model's operations, so TFLOP/s are not shown")
    weights: Settings = dict(engine.trained_weights(flops)) if flops else {}
    peak = device_peak(str(run.args.model_info.torch_dtype).removeprefix("torch."))
    return StepMeter(flops, get_world_size(), peak, peak_memory, references=engine.references, **weights)


def _values(step: int, result: Step, loss: float) -> dict[str, float]:
    """What a log line says of a step alone. Raises: SwiftliteError if training has diverged."""
    norm = result.grad_norm
    check_finite(step, {"loss": loss, "gradient norm": norm or 0.0})
    values = {"loss": loss, "lr": result.lr}
    if norm is not None:
        values["grad_norm"] = norm
    if result.loss_scale is not None:
        values.update(loss_scale=result.loss_scale, skipped_steps=result.skipped)
        if norm is None:
            say_skipped(step, result.loss_scale, result.skipped)
    return values


def say_started(run: Run, engine: Engine) -> None:
    """What runs, before it runs."""
    parameters, plan = list(engine.parameters()), run.plan
    trained, total = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (False, True))
    for line in engine.describe():
        logger.info("%s", line)
    logger.info(
        "%s of %s parameters on this rank are trained; %d steps of %d samples (micro batch %d x %d accumulated x %d "
        "data-parallel ranks), %s training and %d validation samples", f"{trained:,}", f"{total:,}", run.steps,
        run.global_batch, plan.micro_batch_size, plan.num_microbatches, plan.dp_size, run.order.num_samples or "streamed",
        len(run.val_set) if run.val_set is not None else 0,
    )  # fmt: skip


def say_ended(run: Run, engine: Engine, step: int, last: Mapping[str, float], seconds: float) -> None:
    """What the run has come to, and what can be done with it."""
    if not last:
        logger.info("all %d steps were done before; nothing is left to do", step)
    else:
        logger.info(
            "%s step %d in %s; loss %.6g; peak memory %s", "stopped at" if run.stopped else "finished", step,
            format_seconds(seconds), last["loss"], peak_memory_text(),
        )  # fmt: skip
    for path in run.written:
        logger.info("wrote %s", path)
    if run.best.checkpoint:
        logger.info("best checkpoint: %s, %s", run.root / run.best.checkpoint, run.best.describe())
    log_next(*engine.next_command())
    if run.stopped:
        say_how_to_go_on(run.args, run.stop)
