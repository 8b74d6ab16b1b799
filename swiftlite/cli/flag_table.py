"""The flags that ms-swift users type, and what each does here: `python -m swiftlite.cli.flag_table > docs/flags.md`.

A test parses every flag below and fails if docs/flags.md is not what this module writes.
"""

from __future__ import annotations

import sys

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import Arguments, alias_table, notes, specs

# Flag -> a value as it is usually typed.
EXPORT: dict[str, str] = {
    "model": "DIR", "to_mcore": "true", "to_hf": "true", "mcore_model": "DIR", "mcore_adapter": "DIR",
    "output_dir": "DIR", "torch_dtype": "bfloat16", "test_convert_precision": "true",
    "test_convert_dtype": "float32", "thread_count": "4", "device_map": "auto", "model_type": "glm4_5",
    "use_hf": "true", "merge_lora": "true", "save_missing_weights": "true", "exist_ok": "true",
    "tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "2", "expert_model_parallel_size": "2",
    "adapters": "DIR", "mtp_num_layers": "1", "linear_decoupled_in_proj": "true", "fp8_format": "e4m3",
    "fp8_recipe": "blockwise", "fp8_param_gather": "true", "to_cached_dataset": "true", "push_to_hub": "true",
    "hub_model_id": "ORG/NAME", "hub_token": "TOKEN",
}  # fmt: skip

MEGATRON_SFT: dict[str, str] = {
    "model": "DIR", "micro_batch_size": "1", "global_batch_size": "16", "lr": "1e-4", "min_lr": "1e-5",
    "lr_warmup_fraction": "0.05", "output_dir": "DIR", "dataloader_num_workers": "8", "dataset_num_proc": "8",
    "sequence_parallel": "true", "cross_entropy_loss_fusion": "true", "dataset": "FILE",
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": "1",
    "finetune": "true", "save_safetensors": "true", "no_save_optim": "true", "no_save_rng": "true",
    "num_train_epochs": "1", "save_steps": "200", "max_length": "2048", "load_from_cache_file": "true",
    "tensor_model_parallel_size": "2", "eval_steps": "200", "split_dataset_ratio": "0.01",
    "attention_backend": "flash", "tuner_type": "lora", "train_type": "lora", "lora_rank": "8", "lora_alpha": "32",
    "target_modules": "all-linear", "expert_model_parallel_size": "4", "moe_grouped_gemm": "true",
    "moe_shared_expert_overlap": "true", "moe_aux_loss_coeff": "1e-6", "packing": "true",
    "moe_permute_fusion": "true", "merge_lora": "false", "model_author": "swift", "model_name": "robot",
    "freeze_llm": "false", "freeze_vit": "true", "freeze_aligner": "true", "pipeline_model_parallel_size": "2",
    "system": "TEXT", "gradient_accumulation_fusion": "false", "moe_expert_capacity_factor": "2",
    "padding_free": "false", "loss_scale": "ignore_empty_think", "masked_softmax_fusion": "true",
    "add_non_thinking_prefix": "true", "use_precision_aware_optimizer": "true", "task_type": "causal_lm",
    "expert_tensor_parallel_size": "1", "fp8_format": "e4m3", "fp8_recipe": "blockwise",
    "fp8_param_gather": "true", "mtp_num_layers": "1", "optimizer_cpu_offload": "true",
    "optimizer_offload_fraction": "0.4", "context_parallel_size": "2", "save_total_limit": "2",
    "decoder_first_pipeline_num_layers": "11", "decoder_last_pipeline_num_layers": "13",
    "overlap_grad_reduce": "true", "overlap_param_gather": "true", "overlap_p2p_comm": "true", "use_hf": "true",
    "async_save": "true", "push_to_hub": "true", "hub_model_id": "ORG/NAME",
}  # fmt: skip

DPO: dict[str, str] = {
    "rlhf_type": "dpo", "beta": "0.1", "loss_type": "sigmoid", "rpo_alpha": "0.1", "ref_model": "DIR",
    "mcore_ref_model": "DIR", "ref_adapters": "DIR", "calculate_per_token_loss": "false", "label_smoothing": "0.1",
    "truncation_strategy": "delete",
}  # fmt: skip

# Other tools' names for settings that have a field here.
SHARED: dict[str, str] = {
    "per_device_train_batch_size": "1", "gradient_accumulation_steps": "4", "learning_rate": "1e-4",
    "warmup_ratio": "0.05", "lr_scheduler_type": "cosine", "max_steps": "100", "train_iters": "100",
    "max_grad_norm": "1.0", "adam_epsilon": "1e-8", "gradient_checkpointing": "true", "save_only_model": "true",
    "router_aux_loss_coef": "0.001", "attn_impl": "sdpa", "sequence_parallel_size": "2", "save_interval": "200",
    "eval_interval": "200", "log_interval": "5", "logging_steps": "5", "external_plugins": "FILE",
    "max_epochs": "1", "save": "DIR", "load": "DIR",
    # Data.
    "columns": '{"text1": "query"}', "interleave_prob": "1.0", "stopping_strategy": "all_exhausted",
    "streaming": "true", "shuffle_buffer_size": "1000", "cached_dataset": "DIR", "packing_length": "4096",
    "group_by_length": "true", "custom_dataset_info": "FILE", "dataset_shuffle": "false", "val_dataset": "FILE",
    "template_backend": "jinja", "enable_thinking": "false", "response_prefix": "TEXT", "lazy_tokenize": "true",
    "packing_num_proc": "4", "strict": "false",
}  # fmt: skip

SECTIONS: tuple[tuple[str, str, type[Arguments], dict[str, str]], ...] = (
    ("export", "`swiftlite export` and `swiftlite megatron export`", ExportArguments, EXPORT),
    ("sft", "`swiftlite megatron sft`", MegatronSftArguments, MEGATRON_SFT),
    ("dpo", "DPO flags of `megatron dpo` and `megatron rlhf`", MegatronDpoArguments, DPO),
    ("shared", "Two names for one setting", MegatronSftArguments, SHARED),
)


def status(cls: type[Arguments], flag: str) -> tuple[str, str]:
    """(acts | default only | default here | rejected, explanation) of a flag of a command."""
    name = alias_table(cls).get(flag)
    note = notes(cls).get(name or flag)
    if note is not None:
        return "default here" if note.kind == "default" else note.kind, note.reason
    if name is None:
        return "rejected", "unknown"
    spec = specs(cls)[name]
    return "acts", spec.help if name == flag else f"as `--{name}`: {spec.help}"


def table() -> str:
    """The text of docs/flags.md."""
    lines = [
        "# Flags that ms-swift users type",
        "",
        "Written by `python -m swiftlite.cli.flag_table`.",
        "",
        "- *acts*: it does what it says.",
        "- *default here*: accepted; swiftlite does this anyway.",
        "- *default only*: another value than the default is an error that gives the reason.",
        "- *rejected*: an error that gives the reason.",
    ]
    for _, title, cls, flags in SECTIONS:
        lines += ["", f"## {title}", "", "| flag | here | |", "|---|---|---|"]
        for flag in flags:
            kind, text = status(cls, flag)
            lines.append(f"| `--{flag}` | {kind} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
