"""LoRA of models whose experts transformers keeps in one tensor: against its own model of the merged weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.cli.main import main
from swiftlite.llm.model.loader import auto_class
from swiftlite.weights.lora import PEFT_PREFIX
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import IDS, assert_close, logits
from tests.megatron.test_lora import adapted, by_name, lora_args, set_by_name

CASES = (
    "mixtral:default", "minimax_m2:default", "granitemoe:default", "gpt_oss:default", "qwen3_vl_moe:default",
    "llama4_text:default",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_experts(case: str, tmp_path: Path) -> None:
    """All projections, of single experts too: live on Megatron, through Megatron's format and back, merged."""
    hf, adapter, mcore, back, merged = (tmp_path / name for name in ("hf", "adapter", "mcore", "back", "merged"))
    base = build_hf(config_of(case), hf)
    bound, args, generator = Checkpoint.open(hf).bound, lora_args(), torch.Generator().manual_seed(0)
    with adapted(hf, args) as model, torch.no_grad():
        values = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in by_name(model).items()}
        set_by_name(model, values)
        found = logits(model.eval(), IDS)
    assert any(".experts.3." in name for name in values)
    adapter.mkdir()
    stored = {PEFT_PREFIX + bound.module_name(name): tensor for name, tensor in values.items()}
    save_file(stored, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": args.lora_rank, "lora_alpha": args.lora_alpha, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model_words = ["export", "--model", str(hf)]
    for words in (
        [*model_words, "--adapters", str(adapter), "--to_mcore", "true", "--output_dir", str(mcore)],
        [*model_words, "--mcore_adapter", str(mcore), "--to_hf", "true", "--output_dir", str(back)],
        [*model_words, "--adapters", str(adapter), "--merge_lora", "true", "--output_dir", str(merged)],
    ):
        assert main(words) == 0
    returned = load_file(back / "adapter_model.safetensors")
    assert returned.keys() == stored.keys() and all(torch.equal(returned[name], stored[name]) for name in stored)
    whole = auto_class(config_of(case)).from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, before = (m(input_ids=IDS, use_cache=False).logits for m in (whole, base))
    assert_close(found, expected)
    assert (expected - before).abs().max() > 0.03 * before.abs().max()
