"""Layers of linear and full attention in one model: Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.hf import HfTarget
from swiftlite.convert.mcore import McoreTarget
from tests.families.cases import CASES, build_hf, config_of

QUIET = Options(quiet=True)


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
