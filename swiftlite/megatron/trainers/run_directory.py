"""The output directory of a run: new, to be resumed, or somebody else's. Imports no megatron-core."""

from __future__ import annotations

from typing import Any

from swiftlite.llm.argument.export import PlanArguments, PushArguments
from swiftlite.llm.pipeline import TRACKER
from swiftlite.llm.train import run_directory
from swiftlite.llm.train.run_directory import versioned
from swiftlite.megatron.argument.megatron import ParallelArguments
from swiftlite.utils.parser import specs

__all__ = ["CHANGEABLE", "default_output_dir", "prepare", "versioned"]

# Settings that may change when a run goes on: where and how it runs, what it logs and saves; not what it computes.
CHANGEABLE = run_directory.CHANGEABLE | frozenset(
    {
        *specs(ParallelArguments),
        "use_cpu_initialization", "recompute_granularity", "recompute_method", "recompute_num_layers",
        "recompute_modules", "moe_token_dispatcher_type", "moe_grouped_gemm", "moe_permute_fusion",
        "moe_shared_expert_overlap", "cross_entropy_loss_fusion", "cross_entropy_fusion_impl",
        "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_swiglu_fusion", "bias_dropout_fusion",
        "apply_rope_fusion", "deterministic_mode", "no_save_optim", "no_save_rng", "no_load_optim", "no_load_rng",
        "swiftlite_version", "finetune", "max_memory", "thread_count", "max_shard_size", "async_save",
        *specs(PlanArguments), *specs(PushArguments),
    }
)  # fmt: skip


def default_output_dir(args: Any) -> str:
    """`megatron_output/NAME` for the model's name."""
    source = str(args.mcore_model or args.model).rstrip("/")
    return f"megatron_output/{source.rsplit('/', 1)[-1]}"


def prepare(args: Any) -> bool:
    """Decide what happens with `args.output_dir`, see swiftlite.llm.train.run_directory.prepare."""
    return run_directory.prepare(args, CHANGEABLE, lambda root: (root / TRACKER).is_file())
