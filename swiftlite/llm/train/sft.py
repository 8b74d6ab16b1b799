"""`swiftlite sft`: supervised fine-tuning with transformers, all parameters or LoRA through peft.

The same arguments, samples, order, schedule and loss (a mean over the tokens of the global batch) as on Megatron.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from swiftlite.llm.argument.sft import SftArguments
from swiftlite.llm.dataset.order import (
    SampleOrder,
    StreamOrder,
    order_of,
    read_data_state,
    steps_of,
    write_data_state,
)
from swiftlite.llm.dataset.report import REJECTS_FILE
from swiftlite.llm.pipeline import as_arguments, load_args, prepare_model_template
from swiftlite.llm.train.data import load_data
from swiftlite.llm.train.metrics import Metrics, format_seconds
from swiftlite.llm.train.packed import block_diagonal_mask, needs_mask
from swiftlite.utils.dist import get_rank, get_world_size
from swiftlite.utils.errors import UsageError
from swiftlite.utils.io import format_bytes, peak_memory_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.parser import specs
from swiftlite.weights.lora import ALL_LINEAR

logger = get_logger()

# Settings that do not change what a run computes: they may differ when it goes on.
CHANGEABLE = frozenset(
    {
        "micro_batch_size", "gradient_accumulation_steps", "attention_backend", "recompute", "dataset_num_proc",
        "load_from_cache_file", "strict_template",
        "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor", "logging_steps",
        "logging_dir", "report_to", "save_steps", "save_total_limit", "save_weights_only", "save_safetensors",
        "eval_steps", "eval_iters", "resume", "add_version", "exist_ok", "output_dir", "ignore_requirements", "use_hf",
        "device_map", "debug", "hub_token",
    }
)  # fmt: skip


def lora_model(model: Any, args: Any) -> Any:
    """The model with LoRA on `--target_modules`; `all-linear` is every projection, neither routers nor the head."""
    from peft import LoraConfig, get_peft_model

    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = set(args.target_modules)
    if "all-linear" in targets:
        targets = (targets - {"all-linear"}) | (set(ALL_LINEAR) & linear)
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias=args.lora_bias,
        use_rslora=args.use_rslora,
        target_modules=sorted(targets),
        modules_to_save=args.modules_to_save or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


class _Stream(torch.utils.data.Sampler[int]):
    """Positions 0 .. count of the run's sample order; one pass is the whole run."""

    def __init__(self, order: SampleOrder | StreamOrder, count: int) -> None:
        self.order, self.count = order, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return (self.order[position] for position in range(self.count))


class SftTrainer(transformers.Trainer):
    """transformers' Trainer with the run's sample order and a validation loss that is a mean over tokens."""

    def __init__(self, *args: Any, sampler: _Stream, schedule: Callable[[int], float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream, self._schedule = sampler, schedule

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                cast(Any, optimizer or self.optimizer), self._schedule
            )
        return self.lr_scheduler

    def _get_train_sampler(self, *_: Any) -> _Stream:
        return self._stream

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted by loss_scale where a batch has it; still a mean over the tokens with a label."""
        if "loss_scale" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, outputs = weighted_loss(model, inputs)
        count = num_items_in_batch
        if count is None:
            count = (inputs["labels"][:, 1:] != -100).sum()
        elif self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes  # ranks' gradients are averaged
        return (total / count, outputs) if return_outputs else total / count

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        model: Any = self.model
        data: Any = self.eval_dataset
        collate: Any = self.data_collator
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        mine = range(get_rank(), len(data), get_world_size())
        for start in range(0, len(mine), self.args.per_device_eval_batch_size):
            rows = [data[i] for i in mine[start : start + self.args.per_device_eval_batch_size]]
            batch = {k: v.to(self.args.device) for k, v in collate(rows).items()}
            count = (batch["labels"][:, 1:] != -100).sum()
            if "loss_scale" in batch:
                loss = weighted_loss(model, batch)[0].double()
            else:
                loss = model(**batch).loss.double() * count
            total += torch.stack([loss, count.double()])
        if get_world_size() > 1:
            torch.distributed.all_reduce(total)
        model.train()
        result = {"eval_loss": float(total[0] / total[1])}
        self.log(result)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, result)
        return result


def weighted_loss(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
    """(cross entropy summed with the weights `loss_scale` [B, S], the model's outputs)."""
    outputs = model(**{k: v for k, v in batch.items() if k not in ("labels", "loss_scale")})
    losses = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    return (losses * batch["loss_scale"][:, 1:]).sum(), outputs


class _Report(transformers.TrainerCallback):
    """Metrics in the form and under the names that Megatron runs have; the last step is always saved."""

    def __init__(self, metrics: Metrics, train_set: Any, global_batch: int) -> None:
        self.train_set, self.global_batch = train_set, global_batch
        self.metrics, self.since, self.last = metrics, time.perf_counter(), {"loss": math.nan}
        self.tokens = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        values = {"lr" if k == "learning_rate" else k: v for k, v in (logs or {}).items() if k != "epoch"}
        if "loss" in values:
            now = time.perf_counter()
            values["tokens_per_second"] = self.tokens / max(now - self.since, 1e-9)
            values["memory_gb"] = peak_memory() / 1e9
            self.since, self.tokens = now, 0
        if "loss" in values or "eval_loss" in values:
            self.last = {**self.last, **values}
            self.metrics.log(state.global_step, values)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.metrics.advance(state.global_step, float(self.last["loss"]), 0.0, 0.0)
        control.should_log |= state.global_step == state.max_steps
        control.should_save |= state.global_step == state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_data_state(self.train_set, directory, state.global_step * self.global_batch)


def peak_memory() -> int:
    """Bytes: allocated on the GPU, or resident on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()


def settle_output(args: Any) -> str | None:
    """Decide what happens with the output directory. Returns: the checkpoint to go on from, or None.

    Raises: UsageError if the directory belongs to another run, or holds something while --resume is false.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if args.output_dir is None:
        args.output_dir = f"output/{str(args.model).rstrip('/').rsplit('/', 1)[-1]}"
    root = Path(args.output_dir)
    if args.add_version:
        args.output_dir = str(root / f"v0-{time.strftime('%Y%m%d-%H%M%S')}")
        return None
    last = get_last_checkpoint(str(root)) if root.is_dir() else None
    if last is None:
        if root.is_dir() and any(p.name != REJECTS_FILE for p in root.iterdir()) and not args.exist_ok:
            raise UsageError(f"{root} is not empty and holds no checkpoint of a run; choose another --output_dir")
        return None
    if not args.resume:
        raise UsageError(f"{root} holds checkpoints and --resume is false; choose another --output_dir")
    stored, mine = load_args(root), json.loads(json.dumps(args.to_dict(), default=str))
    changed = [n for n in specs(type(args)) if n not in CHANGEABLE and n in stored and stored[n] != mine[n]]
    if changed:
        raise UsageError(
            f"{root} belongs to another run: --{changed[0]} was {stored[changed[0]]}, is {mine[changed[0]]}; "
            "choose another --output_dir"
        )
    logger.info("going on from %s", last)
    return str(last)


def lr_schedule(args: Any, steps: int) -> Callable[[int], float]:
    """Share of --lr at a step (from 0), by the formula of megatron-core's OptimizerParamScheduler."""
    decay = args.lr_decay_iters or steps
    warmup = args.lr_warmup_iters if args.lr_warmup_fraction is None else int(args.lr_warmup_fraction * decay)
    lowest = args.min_lr / args.lr if args.lr else 0.0

    def share(step: int) -> float:
        if warmup > 0 and step <= warmup:
            return step / warmup
        if args.lr_decay_style == "constant":
            return 1.0
        if step > decay:
            return lowest
        done = (step - warmup) / (decay - warmup)
        kept = 1 - done if args.lr_decay_style == "linear" else 0.5 * (math.cos(math.pi * done) + 1)
        return lowest + kept * (1 - lowest)

    return share


def training_arguments(args: Any, steps: int, accumulation: int) -> transformers.TrainingArguments:
    """transformers' arguments for a run of `steps` steps; every name has one meaning on both sides."""
    dtype = args.model_info.torch_dtype
    return transformers.TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.micro_batch_size,
        per_device_eval_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip_grad,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_eps,
        save_steps=args.save_steps,
        save_total_limit=args.save_total_limit,
        save_only_model=args.save_weights_only,
        eval_strategy="steps" if args.val_dataset or args.split_dataset_ratio else "no",
        eval_steps=args.eval_steps,
        logging_steps=args.logging_steps,
        seed=args.seed,
        bf16=dtype == torch.bfloat16 and torch.cuda.is_available(),
        fp16=dtype == torch.float16 and torch.cuda.is_available(),
        gradient_checkpointing=args.recompute == "full",
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=0,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to=[],
        disable_tqdm=True,
    )


def sft_main(args: SftArguments | Sequence[str]) -> dict[str, Any]:
    """Train; the same command again goes on where it stopped. Called on every rank.

    Args: args: an arguments object, or words as typed (`["--model", "DIR", "--dataset", "FILE"]`).
    Returns: the last log line's values, `iteration`, `seconds`, `output_dir`.
    Raises: SwiftliteError for everything a user can mend.
    """
    started = time.time()
    args = as_arguments(SftArguments, args)
    if args.model is None:
        raise UsageError("give the model with --model DIR_OR_ID")
    model, template = prepare_model_template(args)
    assert model is not None
    checkpoint = settle_output(args)
    train_set, val_set = load_data(args, template)
    _, accumulation, global_batch = args.batch_sizes(get_world_size())
    steps, order = steps_of(train_set, args, global_batch), order_of(train_set, args, global_batch)
    if checkpoint:
        read_data_state(train_set, Path(checkpoint))
    model.config.use_cache = False  # a cache is of no use in training, and hides where joined samples begin
    masked = template.padding_free and needs_mask(model)
    if args.train_type == "lora":
        model = lora_model(model, args)
    root, main = Path(str(args.output_dir)), get_rank() == 0
    if main:
        root.mkdir(parents=True, exist_ok=True)
        args.save(root)
    done = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
    tensorboard = args.logging_dir or f"{args.output_dir}/runs"
    metrics = Metrics(root, tensorboard, args.report_to, done, steps, main)
    report = _Report(metrics, train_set, global_batch)

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = template.data_collator(rows)
        report.tokens += int(batch["labels"].ne(-100).sum()) * get_world_size()
        if masked:
            batch["attention_mask"] = block_diagonal_mask(batch["position_ids"], model.dtype)
        return batch

    trainer = SftTrainer(
        model=model,
        args=training_arguments(args, steps, accumulation),
        train_dataset=train_set,
        eval_dataset=val_set,
        data_collator=collate,
        processing_class=template.tokenizer,
        callbacks=[report],
        sampler=_Stream(order, steps * global_batch),
        schedule=lr_schedule(args, steps),
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("device %s, dtype %s, attention %s, %d trainable parameters, %d steps of %d samples",
                trainer.args.device, args.model_info.torch_dtype, model.config._attn_implementation, trainable, steps,
                global_batch)  # fmt: skip
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        metrics.close()
    plot = metrics.plot()
    last = root / f"checkpoint-{steps}"
    seconds = time.time() - started
    logger.info("wrote %s in %s, peak memory %s; loss curve: %s", last, format_seconds(seconds),
                format_bytes(peak_memory()), plot)  # fmt: skip
    flag = "--adapters" if args.train_type == "lora" else "--model"
    logger.info("next: swiftlite infer %s%s %s", f"--model {args.model} " if flag == "--adapters" else "", flag, last)
    return {**report.last, "iteration": steps, "seconds": seconds, "output_dir": args.output_dir}
