"""Converted checkpoints in the Transformer Engine spec on a GPU: logits, module tree, the way back. Marker `gpu`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.cli.main import main
from swiftlite.llm.model import reference
from swiftlite.megatron import backend, hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from tests.families.cases import build_hf, config_of
from tests.families.test_round_trip import to_hf, to_mcore
from tests.megatron.test_golden import AIR, CONFIG, parse_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
reference.register()

# Sizes that the fused kernels take: multiples of 16, heads of 64.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2, "vocab_size": 512}
MLA = {"hidden_size": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "vocab_size": 512}
CASES: dict[str, dict[str, Any]] = {
    "qwen3:default": WIDE,
    "qwen2_5:default": {**WIDE, "head_dim": None},
    "llama3_1:default": {**WIDE, "head_dim": None},
    "glm4_5:default": WIDE,
    "glm4_5:qk_norm": WIDE,
    "qwen3_moe:default": WIDE,
    "deepseek_r1:default": MLA,
    "moonlight:default": MLA,
    "ernie:default": {**WIDE, "head_dim": None},
    "deepseek_v2:grouped_ratio2": MLA,
    "mistral:window": WIDE,
    "ministral:default": WIDE,
    "ministral3:default": WIDE,
    "glm4_0414:default": WIDE,
    "olmo2:default": {**WIDE, "head_dim": None},
    "olmoe:default": {**WIDE, "head_dim": None},
    # transformers before 5.18 does not read rotary_dim
    "minimax_m2:default": {**WIDE, "rotary_dim": 32, "partial_rotary_factor": 0.5},
    "granite:default": {**WIDE, "head_dim": None},
    "granitemoe:default": {**WIDE, "head_dim": None},
    "hunyuan_v1_dense:default": WIDE,
    "hunyuan_v1_moe:default": WIDE,
    "gemma2:default": WIDE,
    "gemma3_text:default": WIDE,
    "olmo3:default": {**WIDE, "head_dim": None},
    "exaone4:default": WIDE,
    "gpt_oss:default": {**WIDE, "intermediate_size": 128},
    "seed_oss:default": WIDE,
    "glm4_moe_lite:default": {**MLA, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32},
    "hy_v3:default": {**WIDE, "moe_intermediate_size": 32},
    "phi3:default": {**WIDE, "head_dim": None},
    "phi4:default": {**WIDE, "head_dim": None},
    "smollm3:default": {**WIDE, "head_dim": None},
    "llama4_text:default": {**WIDE, "intermediate_size": 128, "intermediate_size_mlp": 256},
    "qwen3_next:default": WIDE,
    "qwen3_5:text": WIDE,
    "qwen3_5_moe:text": WIDE,
}
LOGITS_ONLY = ("qwen3_5_moe:text",)  # some transformers write its experts apart, the hub has them in one tensor
IDS = torch.randint(0, 500, (2, 192), generator=torch.Generator().manual_seed(3))


def config(case: str) -> dict[str, Any]:
    merged = {**config_of(case), **CASES[case]}
    return {k: v for k, v in merged.items() if v is not None or k in config_of(case)}


def bf16_model(config: dict[str, Any], directory: Path, tokenizer: Path, seed: int = 0) -> None:
    """A model that commands train in bf16, with the tokenizer of another directory."""
    build_hf(config, directory, seed, torch.bfloat16)
    for file in tokenizer.iterdir():
        shutil.copy(file, directory)
    stated = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**stated, "torch_dtype": "bfloat16"}))


def arguments(directory: Path, dtype: str) -> Any:
    args = conversion_arguments(convert_hf_config(read_config(directory)), str(directory), dtype)
    args.use_cpu_initialization = False
    return args


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = IDS.cuda()
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1], device="cuda").expand_as(ids), None).float()


def test_the_backend_is_transformer_engine() -> None:
    found = backend.setup()
    assert found.spec == "te" and found.is_cuda


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loader", ["dist_checkpointing", "weight map"])
def test_logits_and_the_way_back(case: str, loader: str, tmp_path: Path) -> None:
    """bf16 on the GPU may be at most twice as far from fp32 as Hugging Face's own bf16 is."""
    from megatron.core import dist_checkpointing

    hf = build_hf(config(case), tmp_path / "hf", dtype=torch.bfloat16)
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with torch.no_grad():
        half = hf.cuda()(input_ids=IDS.cuda(), use_cache=False).logits.float()
        exact = hf.float()(input_ids=IDS.cuda(), use_cache=False).logits.float()
    with parallel_groups(args := arguments(tmp_path / "mcore", "bfloat16")):
        models = build_models(args)
        model = models[0].cuda().eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        if loader == "weight map":
            hf_io.load_weights(models, tmp_path / "hf")
        else:
            state = {"model": model.sharded_state_dict()}
            loaded = dist_checkpointing.load(state, str(tmp_path / "mcore/iter_0000001"), strict="log_unexpected")
            missing = model.load_state_dict(loaded["model"], strict=False).missing_keys
            assert not [name for name in missing if "_extra_state" not in name]
        mine = logits(model)
        error, theirs = (float((x - exact).norm() / exact.norm()) for x in (mine, half))
        print(f"{case} [{loader}]: Megatron bf16 {error:.2e}, Hugging Face bf16 {theirs:.2e} from fp32")
        assert error <= 2 * theirs + 1e-3
        if case in LOGITS_ONLY:
            return
        written = tmp_path / "live/iter_0000001"
        written.mkdir(parents=True)
        dist_checkpointing.save(model.sharded_state_dict(), str(written))
    (tmp_path / "live/latest_checkpointed_iteration.txt").write_text("1")
    (tmp_path / "live/config.json").write_text(
        json.dumps({**config(case), "num_nextn_predict_layers": 0, "mtp_num_hidden_layers": 0})
    )
    assert set(Checkpoint.open(written).names) <= set(Checkpoint.open(tmp_path / "hf").names)
    to_hf(tmp_path / "live", tmp_path / "back", manifest=False)
    from safetensors.torch import load_file

    original, back = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    for name, tensor in back.items():
        wanted = original[name]
        if not name.endswith("e_score_correction_bias"):  # all parameters were rounded, routers in fp32 too
            wanted = wanted.bfloat16()
        assert torch.equal(tensor.to(wanted.dtype), wanted), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["qwen3:default", "glm4_5:default", "deepseek_r1:default"])
def test_the_command_with_its_precision_check(case: str, dtype: str, tmp_path: Path) -> None:
    build_hf(config(case), tmp_path / "hf")
    flags = ["--test_convert_precision", "true", "--test_convert_dtype", dtype, "--model_type", case.split(":")[0]]
    mcore, back = str(tmp_path / "mcore"), str(tmp_path / "back")
    for words in (
        ["--model", str(tmp_path / "hf"), "--to_mcore", "true", "--output_dir", mcore],
        ["--mcore_model", mcore, "--to_hf", "true", "--output_dir", back],
    ):
        assert main(["export", *words, *flags]) == 0


def test_module_tree_of_glm_4_5_air(tmp_path: Path) -> None:
    """One dense and two MoE layers of the real widths with 8 experts, against the recorded tree."""
    small = {**CONFIG, "num_hidden_layers": 3, "n_routed_experts": 8, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(small))
    args = arguments(tmp_path, "bfloat16")
    args.moe_grouped_impl = "te"  # the recorded tree has Transformer Engine's experts
    with parallel_groups(args):
        mine = parse_tree(str(build_models(args)[0]))
    expected = parse_tree((AIR / "mg_modules.txt").read_text())
    # Recorded with megatron-core 0.13; since 0.17 an absent q/k norm is not a module.
    for name in [n for n in expected if n.endswith(("q_layernorm", "k_layernorm")) and n not in mine]:
        assert expected.pop(name) == "IdentityOp"
    assert mine == expected


@pytest.mark.parametrize("case", ["glm4_5:default", "deepseek_r1:default"])
def test_multi_token_prediction(case: str, tmp_path: Path) -> None:
    """With its MTP block live: every tensor in place, a finite loss with MTP's share, and the same bytes back."""
    from safetensors.torch import load_file

    build_hf(config(case), tmp_path / "hf", dtype=torch.bfloat16)
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    args = arguments(tmp_path / "mcore", "bfloat16")
    args.mtp_num_layers = 1
    with parallel_groups(args):
        models = build_models(args)
        models[0].cuda()
        for parameter in models[0].parameters():
            parameter.data = parameter.data.bfloat16()
        hf_io.load_weights(models, tmp_path / "mcore")
        ids = IDS.cuda()
        positions = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        with torch.no_grad():
            loss = models[0].train()(
                ids, positions, None, labels=ids.roll(-1, 1), loss_mask=torch.ones_like(ids).float()
            )
        assert torch.isfinite(loss).all()
        assert hf_io.save_hf_weights(models, tmp_path / "back", tmp_path / "hf") == []  # nothing is only carried
    original, back = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
