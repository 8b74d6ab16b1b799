"""What model_provider builds: rotary frequencies, latent norms, padded vocabulary. Logits are compared in test_verify."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.megatron.distributed import get_parallel_state, parallel_groups
from swiftlite.megatron.model import provider
from swiftlite.megatron.model.blocks import load_blocks
from swiftlite.megatron.model.provider import build_models, padded_vocab_size
from swiftlite.megatron.model.rope import Rope
from swiftlite.utils.errors import ConfigError, UsageError
from tests.families.cases import config_of

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 333,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 64, "factor": 2.0,
}  # fmt: skip
# What else stands in config.json.
TOP: dict[str, dict[str, Any]] = {
    "longrope, original length at the top": {"original_max_position_embeddings": 64},
    "proportional": {"partial_rotary_factor": 0.5},
    "default": {"rope_theta": 10000.5},
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False, "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, attention_factor": {"type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    "longrope": LONGROPE,
    "longrope, original length at the top": {k: v for k, v in LONGROPE.items() if not k.startswith("original")},
    "longrope, attention_factor": {**LONGROPE, "attention_factor": 1.1},
    "longrope, factor": {**LONGROPE, "factor": 3.0},
    "proportional": {"rope_type": "proportional", "factor": 2.0},
}  # fmt: skip


def arguments(**changes: Any) -> MegatronArguments:
    args = MegatronArguments(torch_dtype="float32")
    args.apply_model_config(convert_hf_config({**CONFIG, **changes}))
    return args


@pytest.mark.parametrize("kind", SCALINGS)
def test_frequencies_are_those_of_transformers_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if kind not in ("default", *ROPE_INIT_FUNCTIONS) and kind.partition(",")[0] not in ROPE_INIT_FUNCTIONS:
        pytest.skip(f"this transformers has no {kind}")
    config = {**CONFIG, "rope_scaling": SCALINGS[kind], **TOP.get(kind, {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rope = Rope(arguments(**{key: config[key] for key in ("rope_scaling", *TOP.get(kind, {}))}).description)
    lengths = {}
    for length in (30, 64, 65, 128, 129, 200):
        reference = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
        assert rope.attention_factor == reference.attention_scaling
        reference(torch.zeros(1, length, 1), torch.arange(length)[None])
        lengths[length] = rope.for_length(length)
        assert torch.equal(lengths[length], reference.inv_freq), length
    changes = not torch.equal(lengths[30], lengths[200])
    assert changes == (kind == "dynamic" or kind.startswith("longrope"))


def test_partial_rotary() -> None:
    model = replace(arguments().description, partial_rotary_factor=0.5)
    assert Rope(model).inv_freq.shape == (4,)  # of a head of 16, 8 rotate, in pairs


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"rope_type": "spiral"}}, "'spiral' is not known; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "needs long_factor"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0, float("nan")]}}, "short_factor nan must be a number"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor '4' must be a number"),
        ({"rope_theta": -1}, "rope_theta -1 must be"),
        ({"rope_theta": "1e4"}, "rope_theta '1e4' must be"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "two values of rope_theta: 10000.0 .at the top"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "two values of rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "two values of factor: 4.0 .rope_parameters. and 2.0 .rope_scaling",
        ),
        ({"original_max_position_embeddings": 32, "rope_scaling": LONGROPE}, "two values of original_max_position"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "by kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: this architecture rotates whole heads"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates whole heads"),
        ({"max_position_embeddings": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "max_position_embeddings"),
    ],
)  # fmt: skip
def test_rope_settings_that_are_refused_at_conversion(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        convert_hf_config({**CONFIG, **config})


def test_rope_settings_that_agree_in_several_places() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    fields = convert_hf_config(
        {**CONFIG, "rope_theta": 10000, "rope_scaling": yarn, "rope_parameters": {**yarn, "rope_theta": 10000.0}}
    )
    assert fields["rope_scaling"] == yarn and fields["rotary_base"] == 10000 and isinstance(fields["rotary_base"], int)
    assert convert_hf_config({**CONFIG, "rope_theta": 10000.5})["rotary_base"] == 10000.5


@pytest.mark.parametrize("architecture", ["Ernie4_5ForCausalLM", "Glm4MoeForCausalLM", "Qwen2ForCausalLM"])
def test_rope_defaults_are_those_of_transformers_classes(architecture: str) -> None:
    import transformers

    config = {
        k: v for k, v in config_of(DEFAULTS_OF[architecture]).items() if k not in ("rope_theta", "rope_parameters")
    }
    config.pop("partial_rotary_factor", None)
    theirs = getattr(transformers, architecture).config_class(**config)
    parameters = getattr(theirs, "rope_parameters", None) or {}
    args = MegatronArguments(torch_dtype="float32")
    args.apply_model_config(convert_hf_config(config))
    assert args.description.rotary_base == (parameters.get("rope_theta") or theirs.rope_theta)
    partial = parameters.get("partial_rotary_factor", getattr(theirs, "partial_rotary_factor", None))
    assert (args.description.partial_rotary_factor or 1) == (partial or 1)


DEFAULTS_OF = {
    "Ernie4_5ForCausalLM": "ernie:dense", "Glm4MoeForCausalLM": "glm4_5:default", "Qwen2ForCausalLM": "qwen2:tied",
}  # fmt: skip


def test_attention_factor_reaches_the_layers() -> None:
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor_from_config,
    )

    rope = Rope(arguments(rope_scaling=SCALINGS["yarn"]).description)
    config = SimpleNamespace()
    rope.set_attention_factor(config)
    assert rope.attention_factor > 1
    assert _yarn_get_concentration_factor_from_config(config) == pytest.approx(rope.attention_factor, rel=1e-12)


@pytest.mark.parametrize(("tp", "rows"), [(1, 333), (2, 334), (4, 336)])
def test_padded_vocab_size(tp: int, rows: int) -> None:
    assert padded_vocab_size(333, tp) == rows


def test_padded_logits_are_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process stands for two: the live vocabulary is padded to 336, as four TP ranks would have it."""
    monkeypatch.setattr(provider, "padded_vocab_size", lambda vocab, tp: 336)
    args = arguments()
    with parallel_groups(args):
        (model,) = build_models(args, perform_initialization=True)
        logits = model(torch.arange(6)[None], torch.arange(6)[None], None)
        assert logits.shape == (1, 6, 336)
        assert torch.isinf(logits[..., 333:]).all()
        assert torch.isfinite(logits[..., :333]).all()
        loss = model(torch.arange(6)[None], torch.arange(6)[None], None, labels=torch.arange(6)[None])
        expected = torch.nn.functional.cross_entropy(logits[0, :, :333], torch.arange(6), reduction="none")
        torch.testing.assert_close(loss[0], expected)
        loss.sum().backward()
        for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
            assert weight[333:].count_nonzero() == 0
            assert weight.grad[333:].count_nonzero() == 0
            assert weight.grad.isfinite().all()


def test_groups_are_taken_down_after_an_error() -> None:
    args = arguments()
    with pytest.raises(RuntimeError, match="in the block"), parallel_groups(args) as parallel:
        assert (parallel.world_size, parallel.dp_size, parallel.is_last_stage) == (1, 1, True)
        assert get_parallel_state() == parallel
        raise RuntimeError("in the block")
    assert not torch.distributed.is_initialized()


def test_sizes_that_do_not_divide_the_processes() -> None:
    args = arguments()
    args.pipeline_model_parallel_size = 2
    with pytest.raises(UsageError, match="multiple of 2 processes"), parallel_groups(args):
        pass
    assert not torch.distributed.is_initialized()


def test_an_unknown_block_is_an_error() -> None:
    assert load_blocks(()) == []
    with pytest.raises(ConfigError, match="no_such_block"):
        load_blocks(["no_such_block"])


def test_models_of_one_process_choose_their_attention_kernels_independently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core keeps the choice in the environment; a user's own setting there is still respected."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        monkeypatch.delenv(name, raising=False)
    args = conversion_arguments(convert_hf_config(config_of("qwen3:default")), str(tmp_path), "float32")
    with parallel_groups(args):
        for choice in ("unfused", "auto", "flash", "unfused"):
            args.attention_backend = choice
            build_models(args)
        monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
        args.attention_backend = "flash"
        with pytest.raises(AssertionError, match="NVTE_FLASH_ATTN"):
            build_models(args)
    of_old = {**LONGROPE, "type": "su", "rope_type": None}  # Phi-3's first name of it
    assert convert_hf_config({**CONFIG, "rope_scaling": of_old})["rope_scaling"]["rope_type"] == "longrope"


def test_layer_outputs_are_dropped_and_embeddings_are_not() -> None:
    """As in transformers' Seed-OSS, whose residual_dropout is behind attention and MLP."""
    with parallel_groups(args := arguments()):
        model = build_models(args, hidden_dropout=0.5, perform_initialization=True)[0].train()
        ids = torch.arange(8).unsqueeze(0)
        embedded = model.embedding(ids, ids)
        assert torch.equal(embedded, model.embedding(ids, ids)) and (embedded != 0).all()
        assert not torch.equal(model(ids, ids, None), model(ids, ids, None))
