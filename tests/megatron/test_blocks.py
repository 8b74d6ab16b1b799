"""Models with unusual layers: packed samples do not see each other, recomputed layers give the same gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from tests.families.cases import build_hf, config_of
from tests.megatron.test_hf_io import assert_close, live, logits

CASES = (
    "mistral:window", "ministral:default", "ministral3:default", "glm4_0414:default", "olmo2:default", "granite:default",
    "hunyuan_v1_dense:default", "gemma2:default", "gemma3_text:default", "olmo3:default", "exaone4:default",
    "gpt_oss:default", "phi3:default", "llama4_text:default", "qwen3_5:text", "qwen3_next:default",
)  # fmt: skip
LENGTHS = (70, 1, 101)
IDS = torch.randint(0, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def packed_logits(model: Any) -> torch.Tensor:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, None, None, max(LENGTHS), max(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return model(IDS, positions, None, packed_seq_params=packed)  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_packed_samples_and_recomputation(case: str, tmp_path: Path) -> None:
    build_hf(config_of(case), tmp_path / "hf")
    found: dict[str, dict[str, torch.Tensor]] = {}
    args = conversion_arguments(convert_hf_config(config_of(case)), str(tmp_path / "hf"), "float32")
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    parts = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "mlp"]}
    with parallel_groups(args):
        for name, overrides in (("kept", {}), ("recomputed", full), ("parts recomputed", parts)):
            models = build_models(args, **overrides)
            hf_io.load_weights(models, tmp_path / "hf")
            model = models[0].train()
            packed = packed_logits(model)
            if name == "kept":
                alone = torch.cat([logits(model, ids) for ids in IDS.split(LENGTHS, 1)], 1)
                assert_close(packed.detach(), alone.detach())
            torch.nn.functional.cross_entropy(packed[0, :-1], IDS[0, 1:]).backward()
            found[name] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kept = found.pop("kept")
    for again in found.values():
        assert again.keys() == kept.keys()
        for name, gradient in kept.items():
            torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("case", ["phi3:longrope", "phi4:mini"])
def test_rotation_by_the_length_of_the_text(case: str, tmp_path: Path) -> None:
    """Equal to transformers on both sides of the original length, 64, where other factors divide the frequencies."""
    hf = build_hf(config_of(case), tmp_path / "hf")
    found = {}
    with live(tmp_path / "hf") as (models, _), torch.no_grad():
        hf_io.load_weights(models, tmp_path / "hf")
        for length in (64, 65, 172):
            found[length] = logits(models[0].eval(), IDS[:, :length])
            assert_close(found[length], hf(input_ids=IDS[:, :length], use_cache=False).logits)
    assert (found[65][:, :64] - found[64]).abs().max() > 0.01
    assert_close(found[172][:, :65], found[65])
