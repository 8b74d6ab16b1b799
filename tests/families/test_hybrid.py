"""Layers of linear and full attention in one model: Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from swiftlite.selftest.check import check_config
from swiftlite.selftest.shrink import shrink_config
from swiftlite.train.flops import model_flops
from tests.families.cases import CASES, build_hf, config_of

QUIET = Options(quiet=True)
NET: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-06, "hidden_act": "silu",
    "full_attention_interval": 4, "partial_rotary_factor": 0.25, "rope_theta": 10000000, "tie_word_embeddings": False,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
           "shared_expert_intermediate_size": 512}  # fmt: skip
# As published, the text part alone.
REAL: dict[str, dict[str, Any]] = {
    "qwen3_next": {**NET, **EXPERTS, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
                   "intermediate_size": 5120, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "qwen3_5": {**NET, "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": 5120,
                "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4, "intermediate_size": 17408,
                "linear_num_value_heads": 48, "mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {**NET, **EXPERTS, "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
                    "num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8, "mtp_num_hidden_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_published_configs_give_the_numbers_of_transformers(kind: str) -> None:
    """Shrunken ones: bit for bit there and back, MTP block included; logits of 512 tokens, gradients."""
    if f"{kind}:default" not in CASES:
        pytest.skip("this transformers has no Qwen3.5")
    result = check_config(kind, shrink_config(REAL[kind]))
    assert result.logits_error <= 1e-5 and result.gradient_error <= 1e-4


def test_operations_of_the_published_models() -> None:
    """A token's matrices, by hand; attention in one layer of four; the states of the others."""
    flops = model_flops(REAL["qwen3_5"])
    mlp, head = 3 * 5120 * 17408, 5120 * 151936
    attention = 5120 * 256 * (2 * 24 + 2 * 4 + 24)
    net = 5120 * (2 * 16 * 128 + 3 * 48 * 128 + 2 * 48)
    assert flops.linear == 2 * (64 * mlp + 16 * attention + 48 * net + head)
    assert flops.attention == 2 * 16 * 2 * 24 * 256
    states = 48 * 4 * 128 * 128  # decayed, read, corrected and read again
    assert flops.recurrence == 2 * 48 * (states + 4 * (2 * 16 + 48) * 128)
    assert 2.5e9 < model_flops(REAL["qwen3_5_moe"]).linear / 2 < 3.5e9, "3 B active"


def fuse_experts(path: Path) -> None:
    """The decoder's experts of each layer in two tensors, as the hubs have them; those of the MTP block stay single."""
    tensors = load_file(path)
    fused = {}
    for name in [n for n in tensors if ".experts.0.gate_proj" in n and not n.startswith("mtp.")]:
        prefix = name.removesuffix(".0.gate_proj.weight")

        def stacked(part: str, prefix: str = prefix) -> torch.Tensor:
            names = [n for n in (f"{prefix}.{e}.{part}.weight" for e in range(99)) if n in tensors]
            return torch.stack([tensors.pop(n) for n in names])

        fused[f"{prefix}.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], 1)
        fused[f"{prefix}.down_proj"] = stacked("down_proj")
    save_file({**tensors, **fused}, path, {"format": "pt"})


@pytest.mark.skipif("qwen3_5_moe:default" not in CASES, reason="this transformers has no Qwen3.5")
def test_experts_of_any_form_make_one_checkpoint(tmp_path: Path) -> None:
    """Files of transformers and files of the hubs differ in form; Megatron's bytes do not, and each form comes back."""
    single, fused = tmp_path / "single", tmp_path / "fused"
    for directory in (single, fused):
        build_hf(config_of("qwen3_5_moe:default"), directory, dtype=torch.bfloat16)
    fuse_experts(fused / "model.safetensors")
    assert len(load_file(fused / "model.safetensors")) < len(load_file(single / "model.safetensors"))
    written = []
    for directory in (single, fused):
        mcore, back = tmp_path / f"{directory.name}-mcore", tmp_path / f"{directory.name}-back"
        convert(Checkpoint.open(directory), McoreTarget(), mcore, QUIET)
        convert(Checkpoint.open(mcore), HfTarget(), back, QUIET)
        assert (back / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
        written.append({p.name: p.read_bytes() for p in (mcore / "iter_0000001").glob("*.distcp")})
    assert written[0] == written[1]
