"""Every flag that ms-swift users type parses, is explained or is refused with a reason; none is silently ignored."""

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from swiftlite.arguments.parser import alias_table, notes, parse, specs
from swiftlite.cli.flag_table import SECTIONS, status, table
from swiftlite.cli.routes import ROUTES
from swiftlite.utils.errors import UsageError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "swiftlite"

# What another flag needs beside it.
COMPANIONS = {
    "to_mcore": ["--model", "DIR"],
    "to_hf": ["--mcore_model", "DIR"],
    "recompute_method": ["--recompute_granularity", "full"],
    "recompute_num_layers": ["--recompute_granularity", "full"],
    "min_lr": ["--lr", "1e-4"],
    "push_to_hub": ["--hub_model_id", "ORG/NAME"],
    "hub_model_id": ["--push_to_hub", "true"],
    "sequence_parallel": ["--tensor_model_parallel_size", "2"],
}
ALL = [(cls, flag, value) for _, _, cls, flags in SECTIONS for flag, value in flags.items()]


def _parse(cls, flag, value):
    base = [] if flag in ("model", "mcore_model", "load") or cls.__name__ == "ExportArguments" else ["--model", "DIR"]
    return parse(cls, [*base, *COMPANIONS.get(flag, []), f"--{flag}", value])


@pytest.mark.parametrize("cls, flag, value", ALL, ids=lambda item: item if isinstance(item, str) else None)
def test_flag_does_what_the_table_says(cls, flag, value):
    kind, text = status(cls, flag)
    assert text and text != "unknown"
    if kind == "acts":
        args = _parse(cls, flag, value)
        name = alias_table(cls)[flag]
        assert name in args.given
        assert getattr(args, name) is not None or flag == "recompute"
    elif kind == "default here":
        assert flag not in _parse(cls, flag, value).given
    elif kind == "default only":
        spec = specs(cls)[alias_table(cls)[flag]]
        if spec.convert(value) in (spec.default, False, None):
            _parse(cls, flag, value)
        else:
            with pytest.raises(UsageError, match=re.escape(text)):
                _parse(cls, flag, value)
    else:
        assert kind == "rejected"
        with pytest.raises(UsageError, match=re.escape(text)):
            _parse(cls, flag, value)


def test_docs_are_what_the_generator_writes():
    assert (ROOT / "docs/flags.md").read_text(encoding="utf-8") == table()


# Fields that the arguments themselves turn into another setting, and that setting.
TURNED_INTO = {
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
                "template_backend", "context_parallel_size"}  # fmt: skip


def _sources(megatron):
    """(all code that a command runs, the same without the list of settings that may change on resumption)."""
    skipped = {PACKAGE / "arguments"}
    if not megatron:
        skipped |= {PACKAGE / "megatron", PACKAGE / "convert", PACKAGE / "plan", PACKAGE / "selftest"}
    files = [p for p in PACKAGE.rglob("*.py") if not skipped & set(p.parents) and p.name != "flag_table.py"]
    texts = [(p.name, p.read_text(encoding="utf-8")) for p in files]
    return "\n".join(t for _, t in texts), "\n".join(t for name, t in texts if name != "run_directory.py")


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
    read, named = _sources(megatron)
    by_name = _transformer_config_fields() if words[0] == "megatron" else set()
    unread = []
    for field, spec in specs(cls).items():
        if field in notes(cls) or field in by_name or len(spec.choices or "ab") == 1:
            continue
        turned = TURNED_INTO | (MEGATRON_TURNED_INTO if megatron else {})
        targets = (TEMPLATE if field in VIA_TEMPLATE else turned.get(field, field)).split("|")
        by_attribute = any(re.search(rf"\b(?:args|a)\.{re.escape(t)}\b", read) for t in targets)
        if not by_attribute and not any(re.search(rf"[\"']{re.escape(t)}[\"']", named) for t in targets):
            unread.append(field)
    assert not unread, f"{' '.join(words)}: read nowhere: {unread}"


# Flags that speak of files or directories but whose value is none; and the three that expand ~ where they read it.
NO_PATHS = {
    "model_type", "exist_ok", "thread_count", "max_shard_size", "save_safetensors", "add_version", "dry_run",
    "push_to_hub", "wandb_exp_name", "new_special_tokens", "system", "loss_scale",
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
