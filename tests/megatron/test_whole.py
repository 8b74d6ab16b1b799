"""--modules_to_save on Megatron: weights that are trained as a whole beside LoRA, against peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.cli.main import main
from swiftlite.llm.train.sft import sft_main
from swiftlite.megatron.trainers.sft import megatron_sft_main
from swiftlite.megatron.tuners.lora import adapters_disabled
from swiftlite.megatron.tuners.lora_plan import plan_lora
from swiftlite.utils.errors import UsageError
from swiftlite.weights.lora import PEFT_PREFIX
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import IDS, assert_close, logits
from tests.megatron.test_lora import TYPES, adapted, lora_args, off, train

__all__ = ["train"]

# family, whether embeddings are tied, --modules_to_save, other flags
CASES: dict[str, tuple[str, bool, list[str], dict[str, Any]]] = {
    "dense": ("qwen3", False, ["word_embeddings", "lm_head", "norm"], {}),
    "tied": ("qwen3", True, ["lm_head", "norm"], {}),
    "router": ("glm4_moe", False, ["gate", "lm_head"], {"target_modules": ["q_proj", "o_proj"]}),
    "new tokens": ("qwen3", False, ["embed_tokens"], {"new_special_tokens": ["Paris", "What"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_peft(case: str, train: Any, tiny_model: Any, tmp_path: Path) -> None:
    """The same losses and files, and from the one of Megatron either side goes on."""
    family, tied, names, more = CASES[case]
    base = tiny_model(family, vocab_size=333, tie_word_embeddings=tied)
    flags = {"model": base, "train_iters": 8, "save_steps": 8, "lr": 2e-3, **more}
    theirs = train(sft_main, "hf", family, **flags, modules_to_save=names)
    mine = train(megatron_sft_main, "mcore", family, **flags, modules_to_save=names)
    assert off(theirs, mine) <= 1e-5 and off(theirs, mine, "grad_norm") <= 1e-5
    last = tmp_path / "mcore/iter_0000008"
    one, two = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "hf/checkpoint-8", last))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert (two[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    start = load_file(base / "model.safetensors")
    whole = {n: t for n, t in two.items() if n.removeprefix(PEFT_PREFIX) in start}
    assert len(whole) >= len(names)
    for name, tensor in whole.items():
        moved = (
            (tensor[: len(start[name.removeprefix(PEFT_PREFIX)])] - start[name.removeprefix(PEFT_PREFIX)]).abs().max()
        )
        assert moved == 0 if name.endswith("bias") else moved > 1e-3, name
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "hf/checkpoint-8", last)]
    for key in ("modules_to_save", "ensure_weight_tying", "trainable_token_indices"):
        assert (configs[0].get(key) or None) == (configs[1].get(key) or None), key

    if "new_special_tokens" not in more:
        check_conversions(base, family, tmp_path)
    theirs = train(sft_main, "hf-further", family, **flags | {"train_iters": 2}, adapters=[last])
    mine = train(
        megatron_sft_main, "mcore-further", family, **flags | {"train_iters": 2}, mcore_adapter=tmp_path / "mcore"
    )
    assert off(theirs, mine) <= 1e-5 and off(theirs, mine, "grad_norm") <= 1e-5


def check_conversions(base: Path, family: str, root: Path) -> None:
    """Both ways bit for bit; merged it is the model that peft makes of it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def export(*words: str | Path) -> None:
        assert main(["export", "--model", *map(str, (base, "--model_type", TYPES[family], *words))]) == 0

    peft = root / "mcore/iter_0000008"
    export("--mcore_adapter", root / "mcore", "--to_hf", "true", "--output_dir", root / "back")
    export("--adapters", peft, "--to_mcore", "true", "--output_dir", root / "there")
    export("--mcore_adapter", root / "there", "--to_hf", "true", "--output_dir", root / "again")
    export("--mcore_adapter", root / "mcore", "--merge_lora", "true", "--output_dir", root / "merged")
    wanted = load_file(peft / "adapter_model.safetensors")
    for directory in ("back", "again"):
        found = load_file(root / directory / "adapter_model.safetensors")
        assert set(found) == set(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)
    model, merged = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (base, root / "merged"))
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(model, peft).eval()(input_ids=IDS, use_cache=False).logits
        assert_close(merged(IDS, use_cache=False).logits, theirs)


def test_without_adapters_the_model_is_the_origin(tmp_path: Path) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    with adapted(tmp_path / "hf", lora_args(modules_to_save=["embed_tokens", "norm"])) as model, torch.no_grad():
        base = logits(model, IDS)
        for parameter in model.adapters.whole.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        changed = logits(model, IDS)
        assert (changed - base).abs().max() > 0.01
        for _ in range(2):
            with adapters_disabled([model]):
                assert torch.equal(logits(model, IDS), base)
            assert torch.equal(logits(model, IDS), changed)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["o_proj"], "o_proj has LoRA too"),
        (["q_proj"], "q_proj.weight is a part of self_attention.linear_qkv.weight on Megatron"),
        (["experts"], "is a part of mlp.experts.experts.linear_fc1.weight on Megatron"),
        (["nothing"], "no such module; there are .*embed_tokens, .*gate, .*lm_head"),
    ],
)
def test_what_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    build_hf(config_of("glm4_5:default"), tmp_path / "hf")
    with pytest.raises(UsageError, match=f"--modules_to_save.*{message}"):
        plan_lora(Checkpoint.open(tmp_path / "hf").bound, lora_args(modules_to_save=names))
