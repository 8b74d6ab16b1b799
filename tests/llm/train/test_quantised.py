"""LoRA on weights that bitsandbytes quantises while they are loaded (QLoRA), on the CPU; its optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint import preflight
from swiftlite.cli.main import main
from swiftlite.llm import pipeline
from swiftlite.llm.train.sft import sft_main
from swiftlite.train.plot import read_run
from swiftlite.train.schedule import build_optimizer
from swiftlite.utils.errors import UsageError
from tests.rows import preference_rows


def words(model: Path, root: Path, *flags: str) -> list[str]:
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in preference_rows(8)))
    return ["--model", str(model), "--model_type", "qwen3", "--template", "qwen3", "--dataset", str(data), "--lr", "1e-2",
            "--train_iters", "6", "--global_batch_size", "4", "--torch_dtype", "bfloat16", "--logging_steps", "1",
            "--report_to", "none", "--train_type", "lora", "--lora_dropout", "0", *flags]  # fmt: skip


@pytest.mark.parametrize("bits", ["4", "8"])
def test_lora_on_quantised_weights(bits: str, tiny_model: Any, tmp_path: Path) -> None:
    """It learns as on plain weights, which differ by the rounding, holds fewer bytes, and leaves an adapter for both."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=32)
    found = {}
    ways = {"plain": (), "packed": ("--quant_bits", bits, "--quant_method", "bnb")}
    if bits == "4":
        ways["stored"] = ("--quant_bits", bits, "--bnb_4bit_quant_storage", "bfloat16")
    for name, flags in ways.items():
        sft_main([*words(model, tmp_path, *flags), "--output_dir", str(tmp_path / name)])
        found[name] = [line["loss"] for line in read_run(tmp_path / name / "logging.jsonl")]
    plain, packed = found["plain"], found["packed"]
    assert packed != plain and packed == pytest.approx(plain, rel=0.02)
    assert packed[-1] < 0.9 * packed[0]
    assert found.get("stored", packed) == packed  # the same bytes, seen as other numbers
    sft_main(
        [*words(model, tmp_path, "--quant_bits", bits, "--train_iters", "6"), "--output_dir", str(tmp_path / "packed")]
    )
    adapter = str(tmp_path / "packed/checkpoint-6")
    export = ["export", "--adapters", adapter, "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")]
    assert main([*export, "--model", str(model), "--model_type", "qwen3"]) == 0
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("quantization_config") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quant_method": "hqq", "quant_bits": 4}, "--quant_method hqq: .*use bnb"),
        ({"quant_method": "bnb"}, "give --quant_bits 4 or 8"),
        ({"quant_bits": 3}, "must be 4 or 8"),
        ({"quant_bits": 4, "train_type": "full"}, "trains LoRA alone"),
        ({"quant_bits": 4, "fsdp": ["full_shard"]}, "cannot be divided"),
        ({"quant_bits": 4, "bnb_4bit_quant_storage": "int4"}, "--bnb_4bit_quant_storage int4: must be"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SftArguments(**{"train_type": "lora", **flags})


def test_what_bitsandbytes_is_told(monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.BitsAndBytesConfig", dict)
    for given, stored in [({}, "uint8"), ({"bnb_4bit_quant_storage": "bf16"}, "bfloat16")]:
        args = SftArguments(train_type="lora", quant_bits=4, bnb_4bit_compute_dtype="fp32", **given)
        args.model_info = SimpleNamespace(quant_method=None, torch_dtype=torch.bfloat16)
        told = pipeline._quantised(args)["quantization_config"]
        assert told["bnb_4bit_quant_storage"] == stored and told["bnb_4bit_compute_dtype"] == "float32"


@pytest.mark.parametrize("flags", [["--quant_bits", "4"], ["--optim", "paged_adamw_8bit"]])
def test_a_missing_package_is_named(
    flags: list[str], tiny_model: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(preflight, "_installed", lambda name: name != "bitsandbytes")
    assert main(["sft", *words(tiny_model("qwen3"), tmp_path, *flags), "--output_dir", str(tmp_path / "run")]) != 0
    assert f"{' '.join(flags)}: pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("optim", "kind"),
    [("adamw_8bit", "AdamW8bit"), ("paged_adamw", "PagedAdamW32bit"), ("paged_adamw_8bit", "PagedAdamW8bit")],
)
def test_optimizers_of_bitsandbytes(optim: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Linear(64, 128)
    optimizer = build_optimizer(model, SftArguments(optim=optim, adam_beta2=0.9))
    assert type(optimizer).__name__ == kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert tuple(optimizer.param_groups[0]["betas"]) == (0.9, 0.9)
