"""The output directory of a run: new, to be resumed, or somebody else's. Imports no megatron-core."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftlite.llm.dataset.report import REJECTS_FILE
from swiftlite.llm.pipeline import ARGS_FILE, TRACKER, load_args
from swiftlite.megatron.argument.megatron import ParallelArguments
from swiftlite.utils.errors import UsageError
from swiftlite.utils.parser import specs

# Settings that may change when a run goes on: where and how it runs, what it logs and saves; not what it computes.
CHANGEABLE = frozenset(
    {
        *specs(ParallelArguments),
        "micro_batch_size", "gradient_accumulation_steps", "attention_backend", "use_cpu_initialization",
        "recompute", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
        "moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap",
        "cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "gradient_accumulation_fusion",
        "masked_softmax_fusion", "bias_swiglu_fusion", "bias_dropout_fusion", "apply_rope_fusion",
        "deterministic_mode", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
        "dataset_num_proc", "load_from_cache_file", "strict_template",
        "logging_steps", "logging_dir", "report_to", "wandb_project", "wandb_exp_name", "debug",
        "save_steps", "save_total_limit", "save_weights_only", "save_safetensors", "no_save_optim", "no_save_rng",
        "no_load_optim", "no_load_rng", "eval_steps", "eval_iters", "resume", "add_version", "exist_ok", "output_dir",
        "ignore_requirements", "use_hf", "device_map", "swiftlite_version", "finetune", "max_memory", "thread_count",
        "max_shard_size",
    }
)  # fmt: skip


def default_output_dir(args: Any) -> str:
    """`megatron_output/NAME` for the model's name."""
    source = str(args.mcore_model or args.model).rstrip("/")
    return f"megatron_output/{source.rsplit('/', 1)[-1]}"


def versioned(output_dir: str) -> str:
    """`OUTPUT_DIR/v0-DATE`, counting on from the versions that are there."""
    root = Path(output_dir)
    taken = [int(p.name[1:].split("-")[0]) for p in root.glob("v*-*") if p.name[1:].split("-")[0].isdigit()]
    return str(root / f"v{max(taken, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}")


def _as_stored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as args.json gives them back."""
    return json.loads(json.dumps(dict(values), default=str))  # type: ignore[no-any-return]


def prepare(args: Any) -> bool:
    """Decide what happens with `args.output_dir`; nothing is written.

    Returns: True if the run goes on from a checkpoint that is there.
    Raises: UsageError if the directory belongs to another run, or holds something while --resume is false.
    """
    root = Path(args.output_dir)
    if root.is_file():
        raise UsageError(f"--output_dir {root}: is a file; name a directory")
    if not root.is_dir() or all(path.name == REJECTS_FILE for path in root.iterdir()):
        return False
    if not args.resume:
        raise UsageError(
            f"--output_dir {root}: is not empty and --resume is false; name another directory, or --add_version true"
        )
    before = load_args(root)
    if not before:
        raise UsageError(f"--output_dir {root}: is not empty and holds no run ({ARGS_FILE}); name another directory")
    now = _as_stored(args.to_dict())
    changed = [
        name for name in sorted(now) if name not in CHANGEABLE and "_token" not in name and name in before
        and before[name] != now[name]
    ]  # fmt: skip
    if changed:
        shown = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in changed[:3])
        raise UsageError(
            f"--output_dir {root}: holds a run with other settings ({shown}); name another directory, or "
            "--add_version true"
        )
    return (root / TRACKER).is_file()
