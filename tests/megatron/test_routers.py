"""Routers on megatron-core: padding, frozen ones, capacity, recomputation. Their losses: llm/train/test_router_loss.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from safetensors.torch import load_file

from swiftlite.arguments.description import READ_FROM_CONFIG
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.utils.errors import UsageError
from tests.train.test_router_loss import curve, data, steps

__all__ = ["data"]  # a fixture

ROUTED = {"model_type": "glm4_5", "micro_batch_size": 8, "moe_aux_loss_coeff": 0.5, "moe_router_bias_update_rate": 0.05}


@pytest.fixture
def train(tiny_model: Callable[..., Path], data: Path, tmp_path: Path) -> Callable[..., list[float]]:
    """`train(name, **flags)` -> losses and gradient norms of two steps on one padded micro batch of 8 rows each."""

    def run(name: str, **flags: Any) -> list[float]:
        return curve(steps("megatron sft", tiny_model("glm4_moe"), data, tmp_path / name, **{**ROUTED, **flags}))

    return run


def biases(directory: Path) -> dict[str, list[float]]:
    (file,) = directory.glob("*.safetensors")
    found = {
        name: value.tolist() for name, value in load_file(file).items() if name.endswith("e_score_correction_bias")
    }
    assert found
    return found


def test_padding_fills_no_expert(train: Callable[..., list[float]]) -> None:
    """Neither its losses, nor its bias, nor its capacity: a padded micro batch equals one without padding."""
    flags = {"moe_expert_capacity_factor": 0.6, "train_iters": 3}
    joined = train("joined", padding_free="true", **flags)
    assert joined != pytest.approx(train("dropless", padding_free="true", train_iters=3), rel=1e-4), (
        "nothing was dropped"
    )
    assert train("padded", **flags) == pytest.approx(joined, rel=1e-5)
    assert train("buffers", moe_pad_expert_input_to_capacity="true", **flags) == pytest.approx(joined, rel=1e-5)
    assert not get_moe_layer_wise_logging_tracker(), "a table by layer, in which a run with more layers finds no room"


def test_recomputed_routers_count_once_and_see_their_own_batch(train: Callable[..., list[float]]) -> None:
    plain = train("plain", micro_batch_size=4)
    modules = {"recompute": "selective", "recompute_modules": ["layernorm", "moe", "shared_experts", "mlp"]}
    assert train("modules", micro_batch_size=4, **modules) == pytest.approx(plain, rel=1e-6)
    assert train("layers", micro_batch_size=4, recompute="full") == pytest.approx(plain, rel=1e-6)


def test_the_bias_of_a_frozen_router_stays(
    train: Callable[..., list[float]], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    frozen = {
        "train_type": "freeze",
        "freeze_parameters": "model.layers.1.",
        "train_iters": 1,
        "save_safetensors": "true",
    }
    train("freeze", **frozen)
    before = biases(tiny_model("glm4_moe"))
    after = biases(tmp_path / "freeze" / "megatron-sft" / "iter_0000001-hf")
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {"model.layers.2.mlp.gate.e_score_correction_bias"}


MODEL = {
    "num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 2, "padded_vocab_size": 8,
    "num_experts": 8, "moe_router_topk": 2, "max_position_embeddings": 8,
}  # fmt: skip


def arguments(**flags: Any) -> MegatronSftArguments:
    model = {name: flags.pop(name) for name in READ_FROM_CONFIG if name in flags}
    args = MegatronSftArguments(model="M", dataset=["D"], **flags)
    args.apply_model_config({**MODEL, **model})
    return args


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"moe_router_enable_expert_bias": False}, "routers have none"),
        ({"moe_router_enable_expert_bias": True}, "keep the bias that they were trained with"),
        (
            {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "train_type": "lora"},
            "adapters",
        ),
    ],
    ids=["no-bias", "ernie", "lora"],
)
def test_a_bias_rate_that_cannot_act_is_said(
    flags: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert arguments(moe_router_bias_update_rate=0.01, **flags).moe_router_bias_update_rate == 0
    (message,) = (m for m in caplog.messages if "--moe_router_bias_update_rate 0.01" in m)
    assert words in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"moe_expert_capacity_factor": 0.0}, "must be above 0"),
        ({"moe_pad_expert_input_to_capacity": True}, "needs --moe_expert_capacity_factor"),
        ({"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 4.5}, "at most 4 "),
        ({"moe_token_dispatcher_type": "flex"}, "needs --expert_model_parallel_size"),
        ({"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}, "needs the package deep_ep"),
        ({"recompute_modules": ["moe_acts"]}, "must be one of"),
        ({"recompute_modules": ["mla_up_proj"]}, "the model has none"),
        ({"recompute_modules": ["mlp"], "moe_layer_freq": "[1]*2"}, "the model has none"),
        ({"recompute_modules": ["moe"], "recompute": "full"}, "needs --recompute selective"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "other experts than the model's own choice"),
    ],
)
def test_router_settings_that_cannot_work_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        arguments(**flags)


def test_a_chosen_none_is_kept() -> None:
    args = arguments(moe_router_load_balancing_type="none")
    assert args.moe_router_load_balancing_type == "none"
    assert arguments().moe_router_load_balancing_type == "aux_loss"
