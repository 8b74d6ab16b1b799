"""What a run on the Hugging Face side consists of besides model and data, and transformers' arguments for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.template.trained import trained_chat
from swiftlite.train.checkpoints import Record
from swiftlite.train.flops import attention_pairs
from swiftlite.train.intervals import Best, Rhythm, names_of
from swiftlite.train.meters import StepMeter
from swiftlite.train.metrics import Metrics
from swiftlite.train.objective import Objective
from swiftlite.train.order import order_of, steps_of
from swiftlite.train.schedule import lr_schedule
from swiftlite.train.stop import StopSignal
from swiftlite.utils.dist import get_rank, get_world_size
from swiftlite.utils.io import peak_memory_bytes
from swiftlite.utils.logger import get_logger

logger = get_logger()

# What a collated batch says about itself, in this order, before an objective's own counts.
COUNTS = ("tokens", "padded_tokens", "samples", "pairs_attended")

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class Setting:
    """What a run consists of besides model and data."""

    def __init__(self, args: SftArguments, template: Any, train_set: Any, val_set: Any, objective: Objective) -> None:
        self.args, self.tokenizer = args, template.tokenizer
        self.root = Path(args.output_dir or "")
        self.dtype = args.model_info.torch_dtype
        self.chat = trained_chat(template) if get_rank() == 0 else None  # rank 0 writes it
        self.micro_batch, self.accumulation, self.global_batch = args.batch_sizes(get_world_size())
        self.steps = steps_of(train_set, args, self.global_batch)
        self.order = order_of(train_set, args, self.global_batch)
        streaming = getattr(train_set, "is_streaming", False)
        per_epoch = None if streaming else len(train_set) / self.global_batch
        self.rhythm = Rhythm(args, self.steps, per_epoch, val_set is not None)
        measured = names_of(objective.metrics) if val_set is not None else None
        self.best = Best(self.root, args.metric_for_best_model, args.greater_is_better, measured)
        self.record = Record(self.root)
        self.stop, self.stopped = StopSignal(), False
        self.meter: StepMeter
        self.metrics: Metrics
        lr_schedule(args, self.steps)  # tells now what does not fit


def set_recompute(args: SftArguments, model: Any) -> None:
    """`full` recomputes whole layers; `selective` attention alone, which all kernels but the plain one do anyway."""
    if args.recompute == "selective" and model.config._attn_implementation == "eager":
        logger.warning("--recompute selective: plain attention (eager) keeps its scores; use --attn_impl sdpa, or full")
    if args.recompute == "full":
        # transformers 5 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def training_arguments(setting: Setting) -> transformers.TrainingArguments:
    """transformers' arguments for a run; every name has one meaning on both sides."""
    args, cpu = setting.args, not torch.cuda.is_available()
    several = get_world_size() > 1
    # transformers 4 leaves what a run before this one in the process asked for, and would compute in it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    return transformers.TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=setting.micro_batch,
        per_device_eval_batch_size=setting.micro_batch,
        gradient_accumulation_steps=setting.accumulation,
        max_steps=setting.steps,
        learning_rate=args.lr or 0.0,
        weight_decay=args.weight_decay,
        max_grad_norm=args.clip_grad,
        save_strategy="no",  # _Steps says when
        save_only_model=args.save_weights_only,
        eval_strategy="no",
        logging_strategy="no",
        seed=args.seed,
        bf16=setting.dtype == torch.bfloat16,
        fp16=setting.dtype == torch.float16,
        # Experts that no token visits: their modules (transformers 4) have no gradients.
        ddp_find_unused_parameters=several and args.model_info.is_moe_model and transformers.__version__[0] == "4",
        ddp_backend="gloo" if cpu and several else None,
        use_cpu=cpu,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        report_to=[],
        disable_tqdm=True,
    )


def counting(collate: Collate, objective: Objective, lengths: Callable[[Any], Sequence[int]]) -> Collate:
    """`collate` with a tensor `counts` beside the batch: COUNTS and the objective's. lengths: tokens of a row's samples."""

    def counted(rows: Sequence[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        sizes = [n for row in rows for n in lengths(row)]
        counts = [sum(sizes), batch["input_ids"].numel(), len(rows), attention_pairs(sizes), *objective.count(batch)]
        batch["counts"] = torch.tensor(counts, dtype=torch.float64)
        return batch

    return counted


def peak_memory() -> int:
    """Bytes: allocated on the GPU, or resident on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()


def sample_lengths(row: Mapping[str, Any]) -> Sequence[int]:
    """Tokens of the samples in a row: one, or those of a packed sequence."""
    return row.get("sample_lengths") or [len(row["input_ids"])]
