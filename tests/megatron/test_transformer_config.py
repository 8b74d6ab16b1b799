"""The TransformerConfig of GLM-4.5-Air against the golden dump: keywords before this machine has its say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.megatron import backend
from swiftlite.megatron.model.config import config_class, config_fields, to_transformer_config
from swiftlite.utils.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden" / "glm4_5_air"

# Fields of the dump (megatron-core 0.13) that later releases removed or renamed.
GONE = {
    "pipeline_model_parallel_split_rank": "encoder-decoder splits were removed in 0.14",
}
GONE_LATER = {
    "async_tensor_model_parallel_allreduce", "enable_cuda_graph", "external_cuda_graph", "tp_comm_split_ag",
    "tp_comm_split_rs", "moe_use_legacy_grouped_gemm", "moe_router_topk_limited_devices", "moe_layer_recompute",
    "moe_router_padding_for_fp8", "moe_extended_tp", "cuda_graph_scope", "cuda_graph_use_single_mempool",
    "cuda_graph_retain_backward_graph", "symmetric_ar_type", "moe_token_dropping", "hetereogenous_dist_checkpoint",
}  # fmt: skip
# Fields that no argument sets and whose default changed after 0.16.
NEW_DEFAULTS = {"moe_deepep_num_sms", "cuda_graph_scope", "cuda_graph_use_single_mempool"}
# Fields that TransformerConfig derives from others after it is built; compared on the built config.
DERIVED = ("init_method", "output_layer_init_method")


def golden_config() -> dict[str, Any]:
    return json.loads((GOLDEN / "config.json").read_text())


def as_text(value: Any) -> Any:
    """A value as the dump spells it."""
    if isinstance(value, torch.dtype):
        return str(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"<function {value.__name__}>"
    return repr(value) if type(value).__name__ == "AttnBackend" else value


def default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def test_golden_transformer_config() -> None:
    args = conversion_arguments(convert_hf_config(golden_config()), "out", "bfloat16")
    fields = config_fields(args)
    known = {f.name: f for f in dataclasses.fields(config_class(args))}
    expected = json.loads((GOLDEN / "transformer_config.json").read_text())
    missing = set(expected) - set(known)
    left_out = set(DERIVED)
    if backend.setup().core_version.startswith("0.16."):
        assert missing == set(GONE)
    else:
        assert missing <= set(GONE) | GONE_LATER
        left_out |= NEW_DEFAULTS - set(fields)
    compared = {n: v for n, v in expected.items() if n in known and n not in left_out}
    assert {n: as_text(fields.get(n, default(known[n]))) for n in compared} == compared


def test_derived_initialisers() -> None:
    args = conversion_arguments(convert_hf_config(golden_config()), "out", "bfloat16")
    built = to_transformer_config(args)
    assert built.init_method.keywords == {"mean": 0.0, "std": 0.02}
    assert built.output_layer_init_method.keywords["std"] == pytest.approx(0.002085144140570748, rel=1e-12)


def test_the_config_follows_the_arguments() -> None:
    config = {**golden_config(), "num_hidden_layers": 3, "n_routed_experts": 6, "first_k_dense_replace": 2}
    fields = config_fields(conversion_arguments(convert_hf_config(config), "out", "bfloat16"))
    assert (fields["num_layers"], fields["num_moe_experts"], fields["moe_layer_freq"]) == (3, 6, [0, 0, 1])


@pytest.mark.parametrize(
    ("dtype", "flags"), [("float32", (False, False)), ("bfloat16", (True, False)), ("float16", (False, True))]
)
def test_precision_flags(dtype: str, flags: tuple[bool, bool]) -> None:
    fields = config_fields(conversion_arguments(convert_hf_config(golden_config()), "out", dtype))
    assert (fields["bf16"], fields["fp16"]) == flags
    assert fields["params_dtype"] == getattr(torch, dtype)


def test_every_adjustment_names_a_field_and_a_reason() -> None:
    args = conversion_arguments(convert_hf_config(golden_config()), "out", "bfloat16")
    known = {f.name for f in dataclasses.fields(config_class(args))}
    for adjustment in backend.ADJUSTMENTS:
        assert adjustment.field in known
        assert adjustment.reason


def test_what_megatron_core_refuses_is_a_config_error() -> None:
    args = MegatronArguments(torch_dtype="float32")
    args.apply_model_config(convert_hf_config(golden_config()))
    with pytest.raises(ConfigError, match="megatron-core refuses"):
        to_transformer_config(args, recompute_granularity="half")


def test_layer_pattern_of_another_length_is_an_error() -> None:
    from swiftlite.megatron.model.config import layers_of

    with pytest.raises(ConfigError, match="describes 2 layers, not 3"):
        layers_of("[0]*1+[1]*1", SimpleNamespace(num_layers=3))
