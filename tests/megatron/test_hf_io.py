"""Live models and Hugging Face files in one process: load, stock load, save, gradients by Hugging Face name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.checkpoint.info import read_config
from swiftlite.llm.model import reference
from swiftlite.megatron import hf_io
from swiftlite.megatron.distributed import parallel_groups
from swiftlite.megatron.model.provider import build_models
from swiftlite.selftest.check import GRADIENT_TOLERANCE
from swiftlite.selftest.gradients import gradient_error
from swiftlite.utils.errors import MapError
from tests.families.cases import build_hf, config_of, distinct_cases
from tests.families.test_round_trip import to_mcore

reference.register()
# One case of each kind of layer.
KINDS = [
    "qwen2_5:default", "llama3_2:default", "qwen3:default", "qwen2_moe:default", "qwen3_moe:mlp_only", "glm4_5:default",
    "glm4_5:qk_norm", "moonlight:default", "deepseek_v2:grouped_ratio2", "deepseek_r1:default", "dots1:default",
    "ernie:default", "deepseek_moe:default", "mimo:default",
    "mistral:window", "ministral:default", "ministral3:default",
    "glm4_0414:default", "olmo2:default", "olmoe:default", "granite:default", "granitemoe:default",
    "hunyuan_v1_moe:default",
    "gemma2:default", "gemma3_text:default", "olmo3:default", "exaone4:default", "gpt_oss:default",
    "phi4:mini", "smollm3:default", "llama4_text:default",
    "glm4_moe_lite:by_types", "hy_v3:default", "bailing_moe:default", "glm_moe_dsa:default",
]  # fmt: skip
IDS = torch.randint(0, 300, (2, 160), generator=torch.Generator().manual_seed(3))


@contextmanager
def live(directory: Path) -> Iterator[tuple[Any, Any]]:
    """(models, args) of an unloaded GPTModel in fp32."""
    args = conversion_arguments(convert_hf_config(read_config(directory)), str(directory), "float32")
    with parallel_groups(args):
        yield build_models(args), args


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def assert_close(mine: torch.Tensor, reference: torch.Tensor) -> None:
    assert (mine - reference).abs().max() <= 1e-5 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("case", distinct_cases())
def test_megatron_core_itself_loads_the_checkpoint(case: str, tmp_path: Path) -> None:
    """The whole model through megatron.core.dist_checkpointing.load; logits against Hugging Face in fp32."""
    from megatron.core import dist_checkpointing

    hf = build_hf(config_of(case), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with live(tmp_path / "mcore") as (models, _), torch.no_grad():
        model = models[0].eval()
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, str(tmp_path / "mcore/iter_0000001"), strict="log_unexpected"
        )
        missing, unexpected = model.load_state_dict(state["model"], strict=False)
        assert not [n for n in (*missing, *unexpected) if "_extra_state" not in n]
        assert_close(logits(model, IDS), hf(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits)


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("origin", ["hf", "mcore"])
def test_load_and_save_are_inverse(case: str, origin: str, tmp_path: Path) -> None:
    hf = build_hf(config_of(case), tmp_path / "hf")
    to_mcore(tmp_path / "hf", tmp_path / "mcore")
    with live(tmp_path / "hf") as (models, _):
        for tensor in models[0].state_dict().values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(float("nan"))
        hf_io.load_weights(models, tmp_path / origin)
        with torch.no_grad():
            assert_close(logits(models[0].eval(), IDS), hf(input_ids=IDS, use_cache=False).logits)
        carried = hf_io.save_hf_weights(models, tmp_path / "back", tmp_path / origin)
    mtp = [n for n in load_file(tmp_path / "hf/model.safetensors") if n in set(carried)]
    assert bool(mtp) == bool(config_of(case).get("num_nextn_predict_layers"))
    original, back = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert list(original) == list(back)
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_a_shard_without_a_rule_is_an_error(tmp_path: Path) -> None:
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    with live(tmp_path / "hf") as (models, _):
        models[0].decoder.layers[0].self_attention.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
        with pytest.raises(MapError, match="self_attention.extra.*no weight rule covers"):
            hf_io.load_weights(models, tmp_path / "hf")


@pytest.mark.parametrize("case", KINDS)
def test_gradients_are_hugging_faces_own(case: str, tmp_path: Path) -> None:
    build_hf(config_of(case), tmp_path / "hf")
    assert gradient_error(tmp_path / "hf") <= GRADIENT_TOLERANCE == 1e-4


def test_gradient_error_sees_a_doubled_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: one tensor's gradient doubled on the Megatron side."""
    build_hf(config_of("qwen3:default"), tmp_path / "hf")
    original = hf_io.save_hf_weights

    def save(models: Any, *args: Any) -> Any:
        models[0].decoder.layers[1].mlp.linear_fc2.weight.data *= 2
        return original(models, *args)

    monkeypatch.setattr(hf_io, "save_hf_weights", save)
    assert gradient_error(tmp_path / "hf") == pytest.approx(1.0, rel=1e-3)
