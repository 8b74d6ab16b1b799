"""Every flag that ms-swift users type parses, is explained or is refused with a reason; none is silently ignored."""

import dataclasses
import functools
import importlib
import importlib.util
import re
import typing
from pathlib import Path

import pytest

from swiftlite.arguments.evaluate import EvalArguments
from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.groups import GROUP_FLAGS
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parallel import OPTIMIZER_DTYPES
from swiftlite.arguments.parser import alias_table, from_dict, given_values, notes, parse, specs
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.task import JUDGING_WORDS, PROBLEMS
from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.cli.flag_table import SECTIONS, rows, status, table
from swiftlite.cli.routes import ROUTES
from swiftlite.utils.errors import UsageError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "swiftlite"

# What another flag needs besides.
PUSH = ["--push_to_hub", "true", "--hub_model_id", "ORG/NAME"]
COMPANIONS = {
    "skip_train": ["--val_dataset", "FILE"],
    "to_mcore": ["--model", "DIR"],
    "to_hf": ["--mcore_model", "DIR"],
    "recompute_method": ["--recompute_granularity", "full"],
    "recompute_num_layers": ["--recompute_granularity", "full"],
    "recompute_modules": ["--recompute_granularity", "selective"],
    "min_lr": ["--lr", "0.1"],
    "fine_grained_activation_offloading": ["--offload_modules", "core_attn"],
    "offload_modules": ["--fine_grained_activation_offloading", "true"],
    "packing_strategy": ["--packing", "true"],
    "pipeline_model_parallel_layout": ["--pipeline_model_parallel_size", "2"],
    **dict.fromkeys(
        ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        ["--pipeline_model_parallel_size", "2"],
    ),
    "fp8_recipe": ["--fp8_format", "e4m3"],
    **dict.fromkeys(OPTIMIZER_DTYPES, ["--use_precision_aware_optimizer", "true"]),
    "push_to_hub": PUSH[2:],
    "hub_model_id": PUSH[:2],
    "hub_private_repo": PUSH,
    "sequence_parallel": ["--tensor_model_parallel_size", "2"],
    "gpus": ["--dry_run", "true"],
    "gpu_memory": ["--dry_run", "true"],
    "cached_val_dataset": ["--cached_dataset", "DIR"],
    **dict.fromkeys(("result_path", "metric"), ["--val_dataset", "FILE"]),
    "tasks": ["--eval_backend", "lm_eval"],
    "eval_backend": ["--tasks", "NAME"],
    "dataset": ["--to_cached_dataset", "true"],
    "adapters": ["--train_type", "lora"],
    "quant_method": ["--quant_bits", "4", "--train_type", "lora"],
    "quant_bits": ["--train_type", "lora"],
    "mcore_adapter": ["--train_type", "lora"],
    "merge_lora": ["--train_type", "lora"],
    "tuner_settings": ["--train_type", "boft"],
    "simpo_gamma": ["--loss_type", "simpo"],
    "loss_weights": ["--loss_type", "sigmoid", "sft", "--loss_weights", "0.5"],
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ["--rlhf_type", "kto"]),
    **dict.fromkeys(
        ("teacher_model", "lmbda", "temperature", "sft_alpha"), ["--rlhf_type", "gkd", "--teacher_model", "DIR"]
    ),
    "teacher_logits": ["--rlhf_type", "gkd"],
    **dict.fromkeys(("num_labels", "problem_type"), ["--task_type", "seq_cls"]),
    "center_rewards_coefficient": ["--rlhf_type", "rm"],
    **dict.fromkeys(
        (name for name in GROUP_FLAGS if name.startswith(("infonce", "max"))), ["--task_type", "embedding"]
    ),
    **dict.fromkeys(JUDGING_WORDS, ["--task_type", "generative_reranker"]),
    "listwise_reranker_temperature": ["--task_type", "generative_reranker", "--loss_type", "listwise_reranker"],
}
EXPORT_COMPANIONS = dict.fromkeys(("teacher_model", "temperature", "teacher_topk"), ["--to_teacher_logits", "true"])
# A value as it is usually typed, where the type does not say one.
VALUES = {
    "tuner_settings": '{"boft_block_size": 8}', "train_type": "lora",
    "torch_dtype": "bf16", "test_convert_dtype": "float32", "attention_backend": "sdpa", "max_shard_size": "5GB",
    "max_memory": "4GB", "gpu_memory": "40GB", "recompute": "full", "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_token_drop_policy": "position", "loss_scale": "last_round", "truncation_strategy": "left", "bf16": "true",
    "label_smoothing": "0.1", "recompute_granularity": "full", "min_lr": "1e-5", "lr": "1e-4",
    "moe_token_dispatcher_type": "allgather", "columns": '{"text1": "query"}',
    "task_type": "seq_cls", "problem_type": "regression", "num_labels": "3",
    "optim": "adamw_torch", "target_regex": ".*", "device_map": "auto",
    "lr_scheduler_kwargs": '{"min_lr": 1e-6}', "init_weights": "pissa", "fsdp": "full_shard",
    "fsdp_config": '{"reshard_after_forward": true}', "bnb_4bit_quant_storage": "bfloat16",
    "loss_weights": "1",
    "deepspeed": "zero2", "quant_method": "bnb", "quant_bits": "4", "bnb_4bit_compute_dtype": "bf16",
    "pipeline_model_parallel_layout": "Et|tL", "lmbda": "0",
}  # fmt: skip
ALL = [(cls, flag) for _, cls, other in SECTIONS for flag in rows(cls, other)]


def _value(cls, flag):
    name = alias_table(cls).get(flag, flag)
    spec, note = specs(cls).get(name), notes(cls).get(name)
    if note is not None and note.kind == "default" and note.allowed:
        return note.allowed[0]
    if name == "loss_type":
        return "cross_entropy" if issubclass(cls, SftArguments) and not issubclass(cls, DpoArguments) else "ipo"
    if name in VALUES or spec is None:
        return VALUES.get(name, "1")
    if spec.choices:
        return spec.choices[-1]
    kinds = {bool: "true", int: "2", float: "0.5"}
    options = [spec.type, *typing.get_args(spec.type)]
    return next((kinds[kind] for kind in options if kind in kinds), "DIR")


def _parse(cls, flag):
    name, known = alias_table(cls).get(flag, flag), alias_table(cls)
    base = [] if name in ("model", "mcore_model") or cls is ExportArguments else ["--model", "DIR"]
    if cls is EvalArguments and name not in ("tasks", "eval_backend"):
        base += ["--val_dataset", "FILE"]
    beside = COMPANIONS.get(name, [])
    if cls is ExportArguments:
        beside = EXPORT_COMPANIONS.get(name, beside)
    return parse(
        cls, [*base, *(beside if not beside or beside[0][2:] in known else []), f"--{flag}", _value(cls, flag)]
    )


@pytest.mark.parametrize("cls, flag", ALL, ids=lambda item: item if isinstance(item, str) else item.__name__)
def test_flag_does_what_the_table_says(cls, flag):
    kind, text = status(cls, flag)
    assert text and text != "unknown"
    if kind == "acts":
        args = _parse(cls, flag)
        name = alias_table(cls)[flag]
        assert name in args.given
        assert getattr(args, name) is not None or flag in ("recompute", "gradient_checkpointing")
    elif kind == "default here":
        assert flag not in _parse(cls, flag).given
    elif kind == "default only":
        spec, note = specs(cls)[alias_table(cls)[flag]], notes(cls)[alias_table(cls)[flag]]
        if spec.convert(_value(cls, flag)) in (spec.default, False, None, *(note.allowed or ())):
            _parse(cls, flag)
        else:
            with pytest.raises(UsageError, match=re.escape(text)):
                _parse(cls, flag)
    else:
        assert kind == "rejected"
        with pytest.raises(UsageError, match=re.escape(text)):
            _parse(cls, flag)


def test_notes_by_command_name_commands():
    """A note for a class that is not part of any command would be told to nobody."""
    commands = [
        getattr(importlib.import_module(m), n) for m, _, n in (r.arguments.partition(":") for r in ROUTES.values())
    ]
    for cls in commands:
        for spec in specs(cls).values():
            if isinstance(spec.unavailable, dict):
                assert set(spec.unavailable) <= {base.__name__ for c in commands for base in c.__mro__}, spec.name


@pytest.mark.parametrize(
    "cls, words, said",
    [
        (SftArguments, ["--num_labels", "2"], "--num_labels 2: goes with --task_type seq_cls"),
        (
            SftArguments,
            ["--task_type", "seq_cls", "--num_labels", "1", "--problem_type", PROBLEMS[0]],
            "is a regression",
        ),
        (SftArguments, ["--task_type", "seq_cls", "--loss_type", "infonce"], "--task_type seq_cls has cross_entropy"),
        (SftArguments, ["--task_type", "seq_cls", "--truncation_strategy", "split"], "one conversation has one label"),
        (SftArguments, ["--task_type", "seq_cls", "--loss_scale", "all"], "--loss_scale: is for the tokens of answers"),
        (
            SftArguments,
            ["--task_type", "reranker", "--num_labels", "2"],
            "--num_labels 2: goes with --task_type seq_cls",
        ),
        (
            SftArguments,
            ["--task_type", "reranker", "--sequence_parallel_size", "2"],
            "megatron sft --context_parallel_size` divides long texts",
        ),
        (MegatronSftArguments, ["--task_type", "reranker", "--packing", "true"], "join texts with --padding_free true"),
        (MegatronSftArguments, ["--task_type", "embedding", "--mtp_num_layers", "1"], "predicts no tokens"),
        (SftArguments, ["--generative_reranker_positive_token", "ja"], "goes with --task_type generative_reranker"),
        (SftArguments, ["--task_type", "clip"], "--task_type clip: must be one of causal_lm, seq_cls, embedding"),
        (PtArguments, ["--task_type", "seq_cls"], "--task_type seq_cls: pt trains on text"),
        (DpoArguments, ["--task_type", "embedding"], "--task_type embedding: --rlhf_type says"),
        (DpoArguments, ["--rlhf_type", "rm", "--ref_model", "DIR"], "--ref_model: --rlhf_type rm has no reference"),
        (DpoArguments, ["--rlhf_type", "rm", "--loss_type", "ipo"], "--rlhf_type rm has none"),
        (DpoArguments, ["--loss_type", "infonce"], "--rlhf_type dpo has sigmoid, ipo"),
        (DpoArguments, ["--center_rewards_coefficient", "0.01"], "goes with --rlhf_type rm only"),
    ],
)
def test_what_does_not_fit_a_task_is_refused(cls, words, said):
    with pytest.raises(UsageError, match=said):
        parse(cls, ["--model", "DIR", *words])


# Of flags as people type them, what says the task.
TYPED = {
    "embedding": "--loss_type infonce --save_safetensors true --tuner_type full --max_length 8192 --finetune true",
    "reranker": "--loss_type listwise_reranker --tuner_type lora --padding_free true --dataset_num_proc 8",
    "generative_reranker": "--loss_type pointwise_reranker --tuner_type lora --lora_rank 8 --lr_warmup_fraction 0.05",
}


@pytest.mark.parametrize("task", TYPED)
def test_groups_are_trained_on_both_sides(task):
    for cls in (SftArguments, MegatronSftArguments):
        args = parse(cls, ["--model", "DIR", "--task_type", task, *TYPED[task].split()])
        assert (args.task_type, args.groups, args.num_labels) == (task, True, 1 if task == "reranker" else None)


def test_a_reward_model_is_one_number():
    args = parse(DpoArguments, ["--model", "DIR", "--rlhf_type", "rm", "--center_rewards_coefficient", "0.01"])
    assert (args.task_type, args.num_labels, args.problem_type, args.has_reference) == (
        "seq_cls",
        1,
        "regression",
        False,
    )
    again = from_dict(DpoArguments, given_values(args))
    assert again.to_dict() == args.to_dict()


def test_megatrons_names_of_what_is_trained_fully():
    args = parse(SftArguments, ["--modules_to_save", "word_embeddings", "output_layer"])
    assert args.modules_to_save == ["embed_tokens", "lm_head"]


def test_docs_are_what_the_generator_writes():
    assert (ROOT / "docs/flags.md").read_text(encoding="utf-8") == table()


# Fields that the arguments themselves turn into another setting, and that setting.
TURNED_INTO = {
    "enable_dft_loss": "token_loss",
    "dataset_dir": "dataset_info",
    "max_samples": "dataset",
    "deepspeed": "fsdp",
    "fsdp_config": "fsdp",
    "loss_weights": "mixture",
    "lr_scheduler_kwargs": "min_lr",
    "debug": "--debug",
    "gradient_accumulation_steps": "batch_sizes",
    "global_batch_size": "batch_sizes",
    "micro_batch_size": "batch_sizes",
    "bf16": "torch_dtype",
    "fp16": "torch_dtype",
    "attention_backend": "attention_backend|hf_attn_implementation",
    "max_shard_size": "max_shard_bytes",
    "max_memory": "max_memory_bytes",
    "torch_dtype": "torch_dtype|dtype",
}
MEGATRON_TURNED_INTO = {"recompute": "recompute_granularity", "save_weights_only": "no_save_optim"}
TEMPLATE = "get_template_kwargs"
VIA_TEMPLATE = {"system", "max_length", "truncation_strategy", "max_pixels", "agent_template", "norm_bbox",
                "use_chat_template", "padding_free", "padding_side", "loss_scale", "response_prefix",
                "template_backend", "context_parallel_size", "sequence_parallel_size"}  # fmt: skip


@functools.cache
def _names_read(megatron):
    """(attributes of arguments that the code of a command reads, names that it quotes)."""
    skipped = {PACKAGE / "arguments"}
    if not megatron:
        skipped |= {PACKAGE / "megatron", PACKAGE / "convert", PACKAGE / "plan", PACKAGE / "selftest"}
    files = [p for p in PACKAGE.rglob("*.py") if not skipped & set(p.parents) and p.name != "flag_table.py"]
    texts = [(p.name, p.read_text(encoding="utf-8")) for p in files]
    attributes = {name for _, text in texts for name in re.findall(r"\b(?:args|a)\.(\w+)", text)}
    # The list of settings that may change on resumption reads none of them.
    quoted = {n for name, t in texts if name != "run_directory.py" for n in re.findall(r"[\"']([-\w]+)(?=[\"'])", t)}
    return attributes, quoted


def _transformer_config_fields():
    """megatron/model/config.py hands on every argument that has a TransformerConfig field of its name."""
    config = pytest.importorskip("megatron.core.transformer.transformer_config")
    return {field.name for field in dataclasses.fields(config.MLATransformerConfig)}


@pytest.mark.parametrize("words", sorted(ROUTES), ids=" ".join)
def test_every_flag_that_acts_is_read_somewhere(words):
    """A flag that no code reads would be accepted and silently ignored."""
    route = ROUTES[words]
    if importlib.util.find_spec(route.handler.partition(":")[0]) is None:
        pytest.skip(f"{route.handler} does not exist yet")
    module, _, name = route.arguments.partition(":")
    cls = getattr(importlib.import_module(module), name)
    megatron = not route.handler.startswith("swiftlite.llm.")
    attributes, quoted = _names_read(megatron)
    by_name = _transformer_config_fields() if words[0] == "megatron" else set()
    unread = []
    for field, spec in specs(cls).items():
        if field in notes(cls) or field in by_name or len(spec.choices or "ab") == 1:
            continue
        turned = TURNED_INTO | (MEGATRON_TURNED_INTO if megatron else {})
        targets = set((TEMPLATE if field in VIA_TEMPLATE else turned.get(field, field)).split("|"))
        if not targets & attributes and not targets & quoted:
            unread.append(field)
    assert not unread, f"{' '.join(words)}: read nowhere: {unread}"


# Flags that speak of files or directories but whose value is none; and the three that expand ~ where they read it.
NO_PATHS = {
    "model_type", "exist_ok", "thread_count", "max_shard_size", "save_safetensors", "add_version", "dry_run",
    "push_to_hub", "wandb_exp_name", "new_special_tokens", "system", "loss_scale", "token_loss",
}  # fmt: skip


def test_every_path_may_begin_with_the_home_directory():
    for route in ROUTES.values():
        module, _, name = route.arguments.partition(":")
        for spec in specs(getattr(importlib.import_module(module), name)).values():
            names_one = re.search(
                r"director|\bfiles?\b|\bpaths?\b|data that|_dir\b|_path\b", f"{spec.help} {spec.name}"
            )
            if names_one and spec.name not in NO_PATHS and spec.type is not bool:
                assert spec.path, f"{name}: --{spec.name} ({spec.help})"


SCRIPTS = [
    {"command": "swift sft", "flags": {
        "model": ["A/B"], "tuner_type": ["lora"], "dataset": ["a#100"], "per_device_eval_batch_size": ["1"],
        "gradient_accumulation_steps": ["1", "16", "/", "1"], "deepspeed": ["zero2"], "eval_strategy": ["no"],
        "gradient_checkpointing_kwargs": ['{"use_reentrant": false}'], "bf16": ["true"], "lr_scheduler_type": ["polynomial"],
    }},
    {"command": "swift infer", "flags": {
        "adapters": ["DIR"], "load_data_args": ["true"], "infer_backend": ["vllm"], "vllm_max_model_len": ["8192"],
    }},
    {"command": "megatron rlhf", "flags": {
        "rlhf_type": ["dpo"], "model": ["A/B"], "load_from_cache_file": ["true"], "dataset": ["a"], "rpo_alpha": ["0.1"],
    }},
    {"command": "megatron sft", "flags": {"model": ["A/B"], "optimizer_cpu_offload": ["true"], "exp_avg_dtype": ["bf16"]}},
    {"command": "swift rlhf", "flags": {"rlhf_type": ["grpo"], "model": ["A/B"], "num_generations": ["8"]}},
    {"command": "swift deploy", "flags": {"model": ["A/B"], "infer_backend": ["vllm"], "served_model_name": ["B"]}},
    {"command": "swift app", "flags": {"model": ["A/B"]}},
    {"command": "swift sft", "flags": {
        "model": ["A/B"], "tuner_type": ["lora"], "quant_bits": ["4"], "bnb_4bit_quant_storage": ["bfloat16"],
    }},
    {"command": "swift sft", "flags": {"model": ["A/B"], "fsdp": ["./examples/fsdp2.json"]}},
    {"command": "swift rlhf", "flags": {
        "rlhf_type": ["dpo"], "model": ["A/B"], "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": ["0.8", "0.2", "1.0"], "rpo_alpha": ["0.0"],
    }},
    {"command": "swift export", "flags": {"model": ["A/B"], "quant_method": ["fp8"], "output_dir": ["B-FP8"]}},
    {"command": "megatron export", "flags": {
        "model": ["A/B"], "to_hf": ["true"], "fp8_recipe": ["blockwise"], "fp8_format": ["e4m3"],
        "fp8_param_gather": ["true"],
    }},
    {"command": "swift infer", "flags": {"model": ["DIR"], "load_data_args": ["true"], "metric": ["acc"]}},
    {"command": "swift deploy", "flags": {"model": ["A/B"], "infer_backend": ["vllm"], "vllm_enforce_eager": ["true"]}},
]  # fmt: skip


def test_table_of_scripts():
    """docs/make_script_table.py on commands as people type them."""
    spec = importlib.util.spec_from_file_location("make_script_table", ROOT / "docs" / "make_script_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [line.strip("| ").split(" | ") for line in module.table(SCRIPTS).splitlines()[2:]]
    assert {row[0]: row[1] for row in rows} == {
        "swift sft": "3", "swift infer": "2", "megatron rlhf --rlhf_type dpo": "1", "megatron sft": "1",
        "swift rlhf --rlhf_type grpo": "0", "swift deploy": "2", "swift app": "0", "swift rlhf --rlhf_type dpo": "1",
        "swift export": "1", "megatron export": "1",
    }  # fmt: skip


@pytest.mark.parametrize(
    "words, name, value",
    [
        (
            ["--target_modules", "linear_qkv", "linear_fc2"],
            "target_modules",
            ["q_proj", "k_proj", "v_proj", "down_proj"],
        ),
        (["--lora_target", "q_proj,v_proj"], "target_modules", ["q_proj", "v_proj"]),
        (["--lora_target", "all"], "target_modules", ["all-linear"]),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_decay_style", "WSD"),
        (["--bf16", "true"], "torch_dtype", "bfloat16"),
        (["--flash_attn", "fa2"], "attention_backend", "flash"),
        (["--save_total_limit", "-1"], "save_total_limit", None),
        (["--tuner_type", "lora_llm"], "train_type", "lora"),
        (["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-7}'], "min_lr", 1e-7),
        (["--lr", "1e-4", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.5}'], "min_lr", 5e-5),
        (
            ["--lr_scheduler_type", "warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 7}'],
            "lr_wsd_decay_iters",
            7,
        ),
        (["--lr_scheduler_type", "warmup_stable_decay"], "lr_wsd_decay_style", "cosine"),
    ],
)
def test_other_libraries_words(words, name, value):
    for cls in (SftArguments, MegatronSftArguments):
        args = parse(cls, ["--model_name_or_path", "A/B", *words])
        assert getattr(args, name) == value
        again = from_dict(cls, given_values(args))  # what --save_config writes, and what args.json says
        assert getattr(again, name) == value


def test_losses_that_mean_cross_entropy():
    parse(SftArguments, ["--model", "A/B", "--loss_type", "loss_scale"])
    with pytest.raises(UsageError, match="infonce: --task_type causal_lm has cross_entropy, loss_scale"):
        parse(SftArguments, ["--model", "A/B", "--loss_type", "infonce"])


def test_values_of_other_tools_name_what_to_use_instead():
    for words, said in [
        (["--train_type", "longlora"], "--train_type longlora: .*use lora"),
        (["--optim", "dist_muon"], "--optim dist_muon: .*use muon"),
        (["--train_type", "nothing"], "--train_type nothing: must be one of full, lora"),
    ]:
        with pytest.raises(UsageError, match=said):
            parse(SftArguments, ["--model", "A/B", *words])


def test_what_is_refused_names_what_does_the_job():
    for words, said in [
        (["--lr_scheduler_kwargs", '{"min_lr_rate": "x"}'], "lr_scheduler_kwargs min_lr_rate"),
        (["--lr_scheduler_kwargs", '{"min_lr_rate": null}'], "lr_scheduler_kwargs min_lr_rate"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "power: --lr_decay_style cosine takes min_lr, min_lr_rate"),
        (["--rlhf_type", "grpo"], "TRL or ms-swift"),
        (["--use_vllm", "true"], "TRL or ms-swift"),
        (["--no_such_flag", "1", "--rlhf_type", "grpo"], "--rlhf_type grpo: .*TRL or ms-swift"),
    ]:
        with pytest.raises(UsageError, match=said):
            parse(DpoArguments, ["--model", "A/B", *words])
    with pytest.raises(UsageError) as told:
        parse(ExportArguments, ["--model", "A/B", "--deepspeed", "zero2"])
    assert "--seed" not in str(told.value)
