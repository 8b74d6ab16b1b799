"""transformers' Trainer as all trainers of the Hugging Face side use it: `run(...)` is one training run.

What is different from the stock Trainer, so that a run equals one on Megatron: the order of samples, a loss that is a
mean over the global batch, schedule and weight decay, fp32 trained weights under autocast, checkpoints that are whole or
absent, log lines.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from swiftlite.checkpoint.files import CONFIG, copy_side_files
from swiftlite.checkpoint.new_tokens import copy_tokenizer, enter_tokens
from swiftlite.llm.model import tuner
from swiftlite.llm.model.names import Others, check_names, load_tensors
from swiftlite.llm.train.begin import FP32_FILE, OPTIMIZER, PREFIX
from swiftlite.llm.train.packed import block_diagonal_mask, needs_mask
from swiftlite.llm.train.setting import (
    COUNTS,
    Collate,
    Setting,
    counting,
    peak_memory,
    set_recompute,
    training_arguments,
)
from swiftlite.train.checkpoints import Start
from swiftlite.train.ending import say_ended
from swiftlite.train.flops import flops_of
from swiftlite.train.fp16 import GROWTH_INTERVAL, INITIAL_SCALE, say_skipped
from swiftlite.train.meters import StepMeter, device_peak
from swiftlite.train.metrics import Metrics, check_finite
from swiftlite.train.objective import Objective
from swiftlite.train.order import SampleOrder, StreamOrder, read_data_state, write_data_state
from swiftlite.train.router_loss import RouterWatch
from swiftlite.train.schedule import build_optimizer, lr_schedule
from swiftlite.train.stop import say_how_to_go_on
from swiftlite.utils.dist import barrier, get_rank, get_world_size
from swiftlite.utils.io import read_json, replace_directory
from swiftlite.utils.logger import get_logger, log_next
from swiftlite.weights.storage import check_overflow, overflows

logger = get_logger()

SAVING = ".saving"  # holds a checkpoint that is being written


class _Stream(torch.utils.data.Sampler[int]):
    """Positions 0 .. count of the run's sample order; one pass is the whole run."""

    def __init__(self, order: SampleOrder | StreamOrder, count: int) -> None:
        self.order, self.count = order, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return (self.order[position] for position in range(self.count))


class HfTrainer(transformers.Trainer):
    """One run. `objective` says what is minimised, `routers` what is added to it by the routers of experts; `setting`
    holds what both sides of swiftlite have in common.
    """

    def __init__(
        self, *args: Any, setting: Setting, objective: Objective, routers: RouterWatch | None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16:
            self.accelerator.native_amp = True  # on a CPU accelerate would compute in fp32, without a scaler
            self.accelerator.scaler = torch.amp.GradScaler(
                self.args.device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL
            )
        self.routers = routers
        self.setting: Setting = setting
        self.objective: Objective = objective
        self.model_accepts_loss_kwargs = True  # losses are divided by the global batch's counts, not per micro batch
        self.loss_is_scaled_for_ga = True
        self.counts: Tensor | None = None  # of the step's global batch, COUNTS and the objective's
        self.step_sums: dict[str, Tensor] = {}
        self.data_seconds = 0.0
        self.evaluation: dict[str, float] = {}
        self.last: dict[str, float] = {"loss": math.nan}
        self.shown = 0  # step up to which the bar has moved
        self.loss_scale = 1.0  # of the step that is being done, fp16 only
        self.scaling: dict[str, float] = {}  # what a log line tells about it

    # ---- data ----

    def _get_train_sampler(self, *_: Any) -> _Stream:
        setting = self.setting
        return _Stream(setting.order, setting.steps * setting.global_batch)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any = None) -> tuple[list[Any], Any]:
        """A step's micro batches, and something that is not None: the counts are in `self.counts`."""
        began = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.data_seconds = time.perf_counter() - began
        counts = torch.stack([batch.pop("counts") for batch in batches]).sum(0).to(self.args.device)
        if get_world_size() > 1:
            torch.distributed.all_reduce(counts)
        self.counts = counts
        return batches, counts[len(COUNTS)]

    # ---- a step ----

    def create_optimizer(self, *_: Any) -> Any:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model, self.setting.args)  # type: ignore[arg-type]
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            schedule = lr_schedule(self.setting.args, self.setting.steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(cast(Any, optimizer or self.optimizer), schedule)
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro batch's share of the global batch's loss; ranks' gradients are averaged, hence the factor."""
        assert self.counts is not None
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
            loss = loss + self.routers.total() / self.setting.accumulation
        return (loss, None) if return_outputs else loss

    def end_step(self) -> bool:
        """Collect the step's sums over all ranks. Returns: whether any rank was asked to stop. Collective."""
        assert self.counts is not None
        names = list(self.step_sums)
        stop = torch.tensor(float(self.setting.stop.requested), dtype=torch.float64, device=self.args.device)
        values = torch.stack([*self.step_sums.values(), stop])
        if get_world_size() > 1:
            torch.distributed.all_reduce(values)
        numbers = torch.cat([values, self.counts]).tolist()
        self.step_sums = {}
        sums = dict(zip([*names, "stop", *COUNTS, *self.objective.counts], numbers, strict=True))
        sums["data_s"] = self.data_seconds
        loss = self.objective.metrics(sums)["loss"]
        check_finite(self.state.global_step, {"loss": loss})
        self.setting.meter.add(sums)
        self.last["loss"] = loss
        return sums["stop"] > 0

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Called after each step, and once more after the last one, with what callbacks are not told."""
        step = self.state.global_step
        if step > self.shown:
            self.shown = step
            if self.args.fp16:
                scheduler: Any = self.lr_scheduler  # has moved once for each step that updated something
                self.scaling = {"loss_scale": self.loss_scale, "skipped_steps": step - scheduler.last_epoch}
                if self.accelerator.optimizer_step_was_skipped:
                    say_skipped(step, self.loss_scale, step - scheduler.last_epoch)
                    grad_norm = None
            norm = 0.0 if grad_norm is None else float(grad_norm)
            check_finite(step, {"gradient norm": norm})
            self.setting.metrics.advance(step, self.last["loss"], kwargs.get("learning_rate") or 0.0, norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line of what is measured since the last one; the stock Trainer's own numbers are not used but these two."""
        if "loss" not in logs:
            return
        meter = self.setting.meter
        values = self.objective.metrics(meter.sums())
        line = {"loss": values.pop("loss"), "lr": logs["learning_rate"]}
        if logs.get("grad_norm") is not None:
            line["grad_norm"] = float(logs["grad_norm"])
        self.last = {**line, **self.scaling, **values, **meter.summary()}
        self.setting.metrics.log(self.state.global_step, self.last)
        self.control.should_log = False

    # ---- evaluation ----

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Means over the whole validation set (or --eval_iters global batches); the last, smaller batch counts too."""
        model: Any = self.model
        data: Any = self.eval_dataset
        collate: Any = self.data_collator
        size = self.args.per_device_eval_batch_size
        limit = self.setting.args.eval_iters
        total = len(data) if limit < 0 else min(len(data), limit * self.setting.global_batch)
        mine = range(get_rank(), total, get_world_size())
        model.eval()
        names: list[str] = []
        added = torch.zeros(0, dtype=torch.float64, device=self.args.device)
        for start in range(0, max(len(mine), 1), size):
            # A rank without samples of its own runs one that counts nothing, so that all know the names.
            batch = collate([data[i] for i in mine[start : start + size]] or [data[0]])
            batch.pop("counts")
            inputs = {name: value.to(self.args.device) for name, value in batch.items()}
            with self.accelerator.autocast():
                sums = self.objective.sums(model, inputs)
            values = torch.stack([value.double() for value in sums.values()]) * bool(len(mine))
            names, added = list(sums), values if not names else added + values
        if get_world_size() > 1:
            torch.distributed.all_reduce(added)
        model.train()
        metrics = self.objective.metrics(dict(zip(names, added.tolist(), strict=True)))
        self.evaluation = {f"eval_{name}": value for name, value in metrics.items()}
        self.setting.metrics.log(self.state.global_step, self.evaluation)
        self.setting.meter.restart_clock()
        self.control.should_evaluate = False
        return dict(self.evaluation)

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.setting.root / SAVING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Into a directory of another name, renamed when all of it is there: a killed save leaves no checkpoint."""
        root, name = self.setting.root, f"{PREFIX}{self.state.global_step}"
        main = get_rank() == 0
        if main:
            shutil.rmtree(root / SAVING, ignore_errors=True)
        barrier()
        super()._save_checkpoint(model, trial)
        barrier()
        if main:
            position = self.state.global_step * self.setting.global_batch
            write_data_state(self.train_dataset, root / SAVING / name, position)
            self.setting.args.save(root / SAVING / name)
            replace_directory(root / SAVING / name, root / name)
            shutil.rmtree(root / SAVING)
            if self.setting.best.saved(self.state.global_step, name, self.evaluation):
                logger.info("best so far: %s", self.setting.best.record)
            limit, best = self.setting.args.save_total_limit, self.setting.best.checkpoint
            self.setting.record.saved([root / name], limit, best)
            logger.info("saved %s", root / name)
        barrier()
        self.setting.meter.restart_clock()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Weights in the model's dtype, beside the files of the model that they come from. Rank 0 only."""
        if get_rank() != 0:
            return
        assert output_dir is not None and self.model is not None
        directory, model = Path(output_dir), self.model
        directory.mkdir(parents=True, exist_ok=True)
        chat, base = self.setting.chat, Path(self.setting.args.model_info.model_dir)
        tokens = self.setting.args.new_special_tokens
        new_tokens = {token: int(self.setting.tokenizer.convert_tokens_to_ids(token)) for token in tokens}
        if self.setting.args.train_type == "lora":
            # peft would write the whole embedding of a vocabulary that has grown.
            model.save_pretrained(directory, save_embedding_layers=False)  # type: ignore[operator]
            if new_tokens:
                copy_tokenizer(base, directory, new_tokens)
            if chat is not None:
                chat.write(directory, base)
            return
        held = {n: p.detach() for n, p in model.named_parameters() if n in tuner.held_in_fp32(model)}
        cast = {value.data_ptr(): value.to(self.setting.dtype) for value in held.values()}
        lost = (name for name, value in held.items() if overflows(value, cast[value.data_ptr()]))
        check_overflow(lost, self.setting.dtype, self.setting.args.allow_overflow)
        state = {name: cast.get(value.data_ptr(), value) for name, value in model.state_dict().items()}
        info = self.setting.args.model_info
        carried = Others.of(info.config).carried(Path(info.model_dir), state)
        if carried:
            logger.info("%d tensors of MTP blocks, which transformers does not train, are carried over", len(carried))
        model.save_pretrained(directory, state_dict={**state, **carried})  # type: ignore[operator]
        # transformers would write them anew in its own release's form, which other releases and tools may not read.
        source, rows = Path(info.model_dir), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        grown = read_json(source / CONFIG).get("vocab_size") not in (None, rows)
        copy_side_files(source, directory, {"vocab_size": rows} if grown else {}, self.setting.dtype)
        if chat is not None:
            chat.write(directory, base)
        if new_tokens:
            enter_tokens(directory, new_tokens)
        if held and not self.args.save_only_model:
            from safetensors.torch import save_file

            save_file({name: value.contiguous() for name, value in held.items()}, directory / FP32_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        directory = Path(resume_from_checkpoint)
        if self.setting.args.train_type == "lora":
            tuner.load_adapter(self.model, directory)
            return
        load_tensors(self.model, directory, Others.of(self.setting.args.model_info.config))
        if (directory / FP32_FILE).is_file():
            from safetensors.torch import load_file

            stored, held = load_file(directory / FP32_FILE), tuner.held_in_fp32(self.model)
            check_names(held - set(stored), set(stored) - held, directory / FP32_FILE)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():  # type: ignore[union-attr]
                    if name in stored:
                        parameter.copy_(stored[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Of a checkpoint that lacks one of them, the other; the learning rate is the step's in any case."""
        if checkpoint is None or (Path(checkpoint) / "scheduler.pt").is_file() and self._has_optimizer(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        scheduler, optimizer = cast(Any, self.lr_scheduler), cast(Any, self.optimizer)
        if self._has_optimizer(checkpoint):
            state = torch.load(Path(checkpoint) / OPTIMIZER, map_location=self.args.device, weights_only=True)
            optimizer.load_state_dict(state)
        scheduler.last_epoch = int(checkpoint.rpartition("-")[2]) - 1
        optimizer._opt_called = True  # silences a warning about the order of calls
        scheduler.step()

    @staticmethod
    def _has_optimizer(checkpoint: str) -> bool:
        return (Path(checkpoint) / OPTIMIZER).is_file()


class _Steps(transformers.TrainerCallback):
    """Says after each step what is to be done."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.trainer: HfTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, *_: Any, **__: Any) -> None:
        if args.fp16 and self.trainer is not None:
            self.trainer.loss_scale = self.trainer.accelerator.scaler.get_scale()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, setting, step = self.trainer, self.setting, state.global_step
        assert trainer is not None
        stop = trainer.end_step()
        trainer.evaluation = {}
        control.should_log = setting.rhythm.logs(step) or stop
        control.should_evaluate = setting.rhythm.evaluates(step)
        control.should_save = setting.rhythm.saves(step) or stop
        control.should_training_stop = step >= setting.steps or stop
        if stop and step < setting.steps:
            setting.stopped = True
            logger.warning("%s: saving step %d of %d, then ending", setting.stop.sent.name, step, setting.steps)


def run(
    args: Any,
    model: Any,
    template: Any,
    data: tuple[Any, Any],
    objective: Objective,
    collate: Collate,
    lengths: Callable[[Any], Sequence[int]],
    start: Start | None,
    *,
    references: int = 0,
    before: Callable[[HfTrainer], None] | None = None,
) -> dict[str, Any]:
    """Train `model` (as tuner.prepare_model made it) on `data`, training and validation set. Collective.

    Args: references: reference models that run beside it, for the meters. before: called when the model is on its device.
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    """
    began = time.time()
    train_set, val_set = data
    setting = Setting(args, template, train_set, val_set, objective)
    root, main = setting.root, get_rank() == 0
    if start:
        read_data_state(train_set, start.directory)
    if main:
        root.mkdir(parents=True, exist_ok=True)
        args.save(root)
    flops = flops_of(args.model_info.config)
    kind: dict[str, Any] = tuner.trained_weights(model, flops) if flops else {}
    setting.meter = StepMeter(
        flops, get_world_size(), device_peak(str(setting.dtype).removeprefix("torch.")), peak_memory,
        references=references, **kind,
    )  # fmt: skip
    masked = template.padding_free and needs_mask(model)

    def with_mask(rows: Sequence[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        if masked:
            batch["attention_mask"] = block_diagonal_mask(batch["position_ids"], model.dtype)
        return batch

    set_recompute(args, model)
    steps = _Steps(setting)
    trainer = HfTrainer(
        model=model,
        args=training_arguments(setting),
        train_dataset=train_set,
        eval_dataset=val_set,
        data_collator=counting(with_mask, objective, lengths),
        callbacks=[steps],
        setting=setting,
        objective=objective,
        routers=RouterWatch.of(model, args),
    )
    steps.trainer = trainer
    if before is not None:
        before(trainer)
    if start:
        for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state"):
            setattr(trainer, name, start.reading()(getattr(trainer, name)))
    trainer.shown = done = start.step if start else 0
    setting.metrics = Metrics(root, args.logging_dir, args.report_to, done, setting.steps, main, args.to_dict())
    trained, total = (sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True))
    logger.info(
        "device %s, dtype %s, attention %s; %s of %s parameters are trained; %d steps of %d samples (micro batch %d x %d "
        "accumulated x %d data-parallel ranks), %s training and %d validation samples", trainer.args.device,
        str(setting.dtype).removeprefix("torch."), model.config._attn_implementation, f"{trained:,}", f"{total:,}",
        setting.steps, setting.global_batch, setting.micro_batch, setting.accumulation, get_world_size(),
        setting.order.num_samples or "streamed", len(val_set) if val_set is not None else 0,
    )  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with setting.stop:
            setting.meter.restart_clock()
            trainer.train(resume_from_checkpoint=str(start.directory) if start else None)
    finally:
        setting.metrics.close()
    return _finish(trainer, done, time.time() - began)


def _finish(trainer: HfTrainer, done: int, seconds: float) -> dict[str, Any]:
    """Plot and last words."""
    setting, step = trainer.setting, trainer.state.global_step
    args, root = setting.args, setting.root
    plot, last = setting.metrics.plot(), root / f"{PREFIX}{step}"
    moved = step != done
    say_ended(
        step, trainer.last["loss"] if moved else None, seconds, peak_memory(),
        [path for path in (last, plot) if moved and path is not None], setting.best, setting.stopped,
    )  # fmt: skip
    if args.train_type == "lora":
        base = ["--model", args.model] if args.model else []  # an adapter knows its base
        log_next("swiftlite", "infer", *base, "--adapters", last, *args.loading_words())
    else:
        log_next("swiftlite", "infer", "--model", last, *args.loading_words(hub=False))
    if setting.stopped:
        say_how_to_go_on(args, setting.stop)
    ended = {"iteration": step, "seconds": seconds, "output_dir": args.output_dir}
    return {**trainer.last, **ended, "signal": setting.stop.sent if setting.stopped else None}
