"""Moving here: settings files as LLaMA-Factory's users write them, and the table of their keys."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import parse
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.train import PtArguments, SftArguments
from swiftlite.cli.flag_table import status
from swiftlite.utils.errors import UsageError

ROOT = Path(__file__).parents[2]
USUAL: dict[str, Any] = {
    "model_name_or_path": "org/model", "trust_remote_code": True, "stage": "sft", "do_train": True,
    "finetuning_type": "lora", "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": "all",
    "dataset": "identity,alpaca_en_demo", "dataset_dir": "data", "template": "qwen3_nothink", "cutoff_len": 2048,
    "max_samples": 1000, "overwrite_cache": True, "preprocessing_num_workers": 16, "dataloader_num_workers": 4,
    "output_dir": "saves/model", "logging_steps": 10, "save_steps": 500, "plot_loss": True, "overwrite_output_dir": True,
    "save_only_model": False, "report_to": "none", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
    "ddp_timeout": 180000000, "resume_from_checkpoint": None, "val_size": 0.1, "per_device_eval_batch_size": 1,
    "eval_strategy": "steps", "eval_steps": 500, "packing": False, "flash_attn": "auto", "enable_liger_kernel": False,
}  # fmt: skip
CASES = {
    "sft": (SftArguments, {}, {"train_type": "lora", "micro_batch_size": 1, "lr": 1e-4, "max_length": 2048}),
    "full": (SftArguments, {"finetuning_type": "full", "pure_bf16": True}, {"train_type": "full"}),
    "pt": (PtArguments, {"stage": "pt"}, {"use_chat_template": False, "packing": False}),
    "dpo": (
        DpoArguments,
        {"stage": "dpo", "pref_beta": 0.2, "pref_loss": "sigmoid"},
        {"beta": 0.2, "rlhf_type": "dpo"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_usual_file_is_taken_as_it_is(case: str, tmp_path: Path) -> None:
    cls, changes, settled = CASES[case]
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**USUAL, **changes}))
    args = parse(cls, [str(file)])
    assert args.dataset == ["identity#<1000", "alpaca_en_demo#<1000"]
    assert args.dataset_info == ["data/dataset_info.json"] and args.target_modules == ["all-linear"]
    assert {name: getattr(args, name) for name in settled} == settled
    assert args.batch_sizes(2) == (1, 8, 16)
    file.write_text(yaml.safe_dump({**USUAL, **changes, "use_galore": True}))
    with pytest.raises(UsageError, match="run.yaml: use_galore: .*--optim adamw_8bit"):
        parse(cls, [str(file)])


def test_files_of_chat_and_export(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    adapted = {name: USUAL[name] for name in ("model_name_or_path", "template", "trust_remote_code")}
    adapted["adapter_name_or_path"] = "saves/model"
    file.write_text(yaml.safe_dump({**adapted, "infer_backend": "huggingface"}))
    assert parse(InferArguments, [str(file)]).adapters == ["saves/model"]
    export = {"export_dir": "merged", "export_size": 5, "export_device": "cpu", "export_legacy_format": False}
    file.write_text(yaml.safe_dump({**adapted, **export}))
    args = parse(ExportArguments, [str(file), "--merge_lora", "true"])
    assert (args.output_dir, args.merge_lora) == ("merged", True)


def test_rows_are_limited_as_there(tmp_path: Path) -> None:
    """`max_samples`: at most so many, where `#N` takes some twice; names are those of dataset_info.json."""
    from swiftlite.llm.dataset.rows import open_stream, read_rows

    rows = [{"instruction": f"{i}?", "input": "", "output": f"{i}"} for i in range(5)]
    (tmp_path / "a,b.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"five": {"file_name": "a,b.json"}}))

    def number(dataset: str, **settings: Any) -> int:
        words = ["--model", "DIR", "--dataset", dataset, "--dataset_dir", str(tmp_path)]
        args = parse(SftArguments, [*words, *(w for n, v in settings.items() for w in (f"--{n}", str(v)))])
        found = len(read_rows(args)[0])
        assert len(list(open_stream(args))) == found
        return found

    assert [number("five", max_samples=n) for n in (3, 8)] == [3, 5]
    assert (number("five#8"), number("five,five#2", max_samples=4), number(str(tmp_path / "a,b.json"))) == (8, 6, 5)


def test_the_table_says_what_keys_do() -> None:
    spec = importlib.util.spec_from_file_location("make_migration", ROOT / "docs/make_migration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+)", module.FILE.read_text(encoding="utf-8"), re.MULTILINE))
    shown = {"acts": "acts", "default here": "accepted", "default only": "default", "rejected": "refused"}
    for _, cls, keys in module.KEYS:
        for key in keys:
            kind, text = status(cls, key)
            assert rows[key] == shown[kind] and text != "unknown", f"{key}: run python docs/make_migration.py"
    assert set(USUAL) <= set(rows)
