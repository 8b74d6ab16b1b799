"""Writes docs/migration.md: `python docs/make_migration.py`. What flags do is read from the arguments."""

from __future__ import annotations

from pathlib import Path

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import Arguments, notes
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.cli.flag_table import status

FILE = Path(__file__).parent / "migration.md"

# Keys of LLaMA-Factory's YAML files, by how often examples have them.
KEYS: tuple[tuple[str, type[Arguments], tuple[str, ...]], ...] = (
    ("sft and pt", SftArguments, (
        "model_name_or_path", "trust_remote_code", "adapter_name_or_path", "stage", "do_train", "finetuning_type",
        "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "dataset", "dataset_dir",
        "eval_dataset", "val_size", "template", "cutoff_len", "max_samples", "overwrite_cache", "packing", "neat_packing",
        "preprocessing_num_workers", "dataloader_num_workers", "output_dir", "logging_steps", "save_steps", "plot_loss",
        "overwrite_output_dir", "save_only_model", "report_to", "run_name", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "num_train_epochs", "max_steps",
        "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "bf16", "pure_bf16", "ddp_timeout",
        "resume_from_checkpoint", "flash_attn",
        "disable_gradient_checkpointing", "enable_liger_kernel",
        "eval_strategy",
        "eval_steps", "image_max_pixels", "video_max_pixels",
        "freeze_vision_tower", "freeze_multi_modal_projector", "use_dora", "use_rslora", "loraplus_lr_ratio", "pissa_init",
        "use_muon", "use_galore", "use_badam", "use_dft_loss", "mask_history", "train_on_prompt", "rope_scaling",
    )),
    ("dpo", DpoArguments, ("pref_beta", "pref_loss", "pref_ftx", "ref_model", "ref_model_adapters")),
    ("export", ExportArguments, ("export_dir", "export_size", "export_device", "export_legacy_format",
                                 "export_quantization_bit")),
    ("infer", InferArguments, ("infer_backend", "vllm_enforce_eager", "max_new_tokens", "temperature")),
)  # fmt: skip

TEXT = """# Coming from ms-swift, Megatron-SWIFT or LLaMA-Factory

Written by `python docs/make_migration.py`.

## A script

`swiftlite port SCRIPT.sh` reads a shell script with `swift ...`, `megatron ...` or launcher commands, runs nothing of it,
and prints what each command is here, with a table of its flags: what each does, and what to change. Its exit code is 0 if
everything runs unchanged. Variables, arrays, sums, continued lines, comments and here-documents are understood.

Names are the same where the thing is the same, so many commands run as they are: `swift sft` -> `swiftlite sft`,
`megatron sft` -> `swiftlite megatron sft`. Each flag does what it says, or is accepted with the reason why it changes no
result, or is refused with the reason and with what to use instead: [flags.md](flags.md) has all.

| there | here |
|---|---|
| `swift sft`, `swift pt`, `swift rlhf --rlhf_type dpo` | `swiftlite sft`, `pt`, `rlhf --rlhf_type dpo` (or `dpo`) |
| `megatron sft`, `megatron pt`, `megatron rlhf --rlhf_type dpo` | `swiftlite megatron sft`, `pt`, `rlhf` |
| `swift infer`, `swift export --merge_lora true` | `swiftlite infer`, `swiftlite export --merge_lora true` |
| `megatron export --to_mcore true`, `--to_hf true` | the same; layouts (TP, PP, EP) are not needed |
| `swift export --to_cached_dataset true` | the same; `--template_mode rlhf` for pairs, `kto` for labelled answers |
| `llamafactory-cli train FILE.yaml` | `swiftlite sft FILE.yaml` (`pt`, `dpo`), or `swiftlite megatron sft FILE.yaml` |
| `llamafactory-cli chat FILE.yaml` | `swiftlite infer FILE.yaml` |
| `llamafactory-cli export FILE.yaml` | `swiftlite export FILE.yaml --merge_lora true` |
| `swift deploy` | the same: vLLM, SGLang or transformers; see [serve.md](serve.md) |
| `swift eval` | `swiftlite eval`; benchmarks by lm-evaluation-harness |
| `swift rollout` | vLLM on the written directory |
| GRPO, PPO, GKD, KTO, ... | TRL, ms-swift or verl on the written directory; the result is converted here |

## What is different

- The text is written by the checkpoint's own chat template, not by a registered one: what servers write from the same
  directory. `--template NAME` asks for a registered one. See [templates.md](templates.md).
- The loss is a mean over the trained tokens of the global batch, on both sides and for every layout. The default global
  batch is 16; `--per_device_train_batch_size` and `--gradient_accumulation_steps` say it as elsewhere.
- Weights that are trained are held in fp32. `--torch_dtype` says in what they are computed and written.
- The same command resumes its own run in `--output_dir`; `--resume_from_checkpoint DIR` names another of its checkpoints,
  `--add_version true` begins anew in `v0-DATE`. Another run's directory is never written into.
- A row that cannot be used is dropped, counted and written to `rejects.jsonl`; more than `--max_drop_ratio` stop the run.
- `--dataset FILE#500` takes 500 rows, some twice if there are fewer; `#<500` (`--max_samples 500`) takes at most 500.
- `--init_weights pissa` and `olora` leave the base weights as they are: what is saved is plain LoRA of twice the rank, which
  merges into the original checkpoint.

## Keys of LLaMA-Factory's YAML files

A YAML or JSON file of settings stands in place of flags: `swiftlite sft FILE.yaml [--flag value ...]`. `dataset: a,b` and
`dataset_dir` with its `dataset_info.json` are read as there.
"""


def table(cls: type[Arguments], keys: tuple[str, ...]) -> str:
    """Key, what it does, the reason or what it says."""
    lines = ["| key | here | |", "|---|---|---|"]
    for key in keys:
        kind, text = status(cls, key)
        note = notes(cls).get(key)
        if note is not None and note.allowed:
            kind = f"accepted: {', '.join(note.allowed)}"
        kind = {"default here": "accepted", "rejected": "refused"}.get(kind, kind)
        lines.append(f"| `{key}` | {kind} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def text() -> str:
    return TEXT + "".join(f"\n### {title}\n\n{table(cls, keys)}" for title, cls, keys in KEYS)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
