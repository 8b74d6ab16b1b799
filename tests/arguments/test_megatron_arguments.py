"""MegatronArguments and the training command: layouts, batch sizes, precision, the model's config."""

import json
from pathlib import Path

import pytest

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.arguments.parser import parse, specs
from swiftlite.utils.errors import ConfigError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden/glm4_5_air"
CONFIG = json.loads((GOLDEN / "megatron_config_after.json").read_text(encoding="utf-8"))


def sft(**kwargs):
    return MegatronSftArguments(model="DIR", **kwargs)


def test_every_field_exists_once():
    """A field that two parts declared would have two defaults; the second declaration would win silently."""
    for name in specs(MegatronSftArguments):
        owners = [c for c in MegatronSftArguments.__mro__ if name in c.__dict__.get("__annotations__", {})]
        assert len(owners) == 1, (name, owners)


def test_needs_weights():
    with pytest.raises(UsageError, match="--model HF_DIR_OR_ID or --mcore_model DIR"):
        MegatronSftArguments()


@pytest.mark.parametrize(
    "sizes, dp, expected",
    [
        ({}, 2, (1, 8, 16)),
        ({"micro_batch_size": 2, "global_batch_size": 8}, 2, (2, 2, 8)),
        ({"micro_batch_size": 2, "gradient_accumulation_steps": 3}, 2, (2, 3, 12)),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 4}, 2, (1, 4, 8)),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 4}, 2, (3, 4, 24)),
        ({"micro_batch_size": 2, "global_batch_size": 16, "gradient_accumulation_steps": 4}, 2, (2, 4, 16)),
    ],
)
def test_batch_sizes(sizes, dp, expected):
    assert sft(**sizes).batch_sizes(dp) == expected


def test_batch_sizes_that_do_not_fit():
    with pytest.raises(UsageError, match="--global_batch_size 9: must be a multiple"):
        sft(global_batch_size=9).batch_sizes(2)
    with pytest.raises(UsageError, match="multiple of --gradient_accumulation_steps 3 x 2 data-parallel"):
        sft(global_batch_size=8, gradient_accumulation_steps=3).batch_sizes(2)
    with pytest.raises(UsageError, match="makes 4; leave one of them out"):
        sft(global_batch_size=8, gradient_accumulation_steps=3, micro_batch_size=1).batch_sizes(2)


def test_names_of_transformers_mean_the_same():
    argv = ["--model", "DIR", "--learning_rate", "1e-3", "--per_device_train_batch_size", "2", "--max_steps", "7",
            "--max_grad_norm", "0.5", "--warmup_ratio", "0.1", "--save_interval", "3", "--attn_impl", "eager",
            "--adam_epsilon", "1e-7", "--gradient_checkpointing", "true"]  # fmt: skip
    args = parse(MegatronSftArguments, argv)
    assert (args.lr, args.micro_batch_size, args.train_iters, args.clip_grad) == (1e-3, 2, 7, 0.5)
    assert (args.lr_warmup_fraction, args.save_steps, args.eval_steps, args.adam_eps) == (0.1, 3, 3, 1e-7)
    assert (args.attention_backend, args.hf_attn_implementation) == ("unfused", "eager")
    assert (args.recompute_granularity, args.recompute_method, args.recompute_num_layers) == ("full", "uniform", 1)
    assert args.num_train_epochs is None


@pytest.mark.parametrize(
    "dtype, flags", [("bf16", (True, False)), ("float16", (False, True)), ("fp32", (False, False))]
)
def test_precision(dtype, flags):
    args = sft(torch_dtype=dtype)
    assert (args.bf16, args.fp16) == flags
    args.set_dtype("float32")
    assert (args.bf16, args.fp16, args.torch_dtype) == (False, False, "float32")


def test_precision_by_flag_and_contradiction():
    assert sft(bf16=True).torch_dtype == "bfloat16"
    with pytest.raises(UsageError, match="contradict each other"):
        sft(bf16=True, torch_dtype="float32")
    with pytest.raises(UsageError, match="--torch_dtype int8: must be bfloat16, float16 or float32"):
        sft(torch_dtype="int8")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"tensor_model_parallel_size": 0}, "--tensor_model_parallel_size 0: must be at least 1"),
        ({"lr": -1.0}, "--lr -1.0: must be 0 or more"),
        ({"lr": 1e-5, "min_lr": 1e-4}, "--min_lr 0.0001: must not be above --lr 1e-05"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 3}, "give one of them"),
        ({"recompute_method": "uniform"}, "need --recompute_granularity full"),
        ({"recompute": "some"}, "--recompute some: must be full, selective or none"),
        ({"attention_backend": "fast"}, "--attention_backend fast: must be one of"),
        ({"train_type": "lora", "lora_bias": "all"}, "--lora_bias all: with LoRA on Megatron biases stay as they are"),
        ({"adapters": ["DIR"]}, "--adapters, --mcore_adapter and --merge_lora: need --train_type lora"),
        ({"save_steps": 0}, "--save_steps 0: must be at least 1"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UsageError, match=message):
        sft(**kwargs)


def test_expert_bias_stays_fixed_in_training_unless_asked():
    assert sft().moe_router_bias_update_rate == 0
    assert sft(moe_router_bias_update_rate=0.001).moe_router_bias_update_rate == 0.001


def test_data_parallel_size():
    args = sft(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert args.data_parallel_size(8) == 2
    with pytest.raises(UsageError, match="6 processes cannot be divided .* multiple of 4 processes"):
        args.data_parallel_size(6)
    with pytest.raises(UsageError, match="expert x expert-tensor x pipeline"):
        sft(expert_model_parallel_size=4).data_parallel_size(2)


def test_model_config_fills_the_fields():
    args = sft(max_length=512)
    args.apply_model_config(CONFIG)
    assert {name: getattr(args.description, name) for name in CONFIG} == CONFIG
    assert args.seq_length == 512 and len(args.description.moe_layer_pattern) == 46


def test_user_settings_outlive_the_config_unless_they_name_other_weights():
    args = sft(attention_dropout=0.1)
    args.apply_model_config(CONFIG)
    assert args.attention_dropout == 0.1
    with pytest.raises(TypeError, match="num_layers"):
        sft(num_layers=4)
    with pytest.raises(UsageError, match="--num_layers: is read from the checkpoint's config.json"):
        parse(MegatronSftArguments, ["--model", "DIR", "--num_layers", "4"])


def test_config_with_a_field_that_is_missing_here():
    with pytest.raises(ConfigError, match="num_wheels"):
        sft().apply_model_config({**CONFIG, "num_wheels": 4})


@pytest.mark.parametrize(
    "layout, message",
    [
        ({"pipeline_model_parallel_size": 4}, "46 layers cannot be divided over 4 stages"),
        ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 15}, "31 layers .* over 2 stages"),
        ({"tensor_model_parallel_size": 5}, "must divide 96 attention heads"),
        ({"tensor_model_parallel_size": 3}, "must divide 8 key/value heads"),
        ({"expert_model_parallel_size": 3}, "must divide 128 experts"),
    ],
)
def test_layouts_that_do_not_fit_the_model(layout, message):
    with pytest.raises(UsageError, match=message):
        sft(**layout).apply_model_config(CONFIG)


def test_uneven_pipeline_that_fits():
    args = sft(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=14)
    args.apply_model_config(CONFIG)
    assert args.description.num_layers == 46


def test_no_experts_to_divide():
    dense = {key: value for key, value in CONFIG.items() if "moe" not in key and key != "num_experts"}
    with pytest.raises(UsageError, match="the model has no experts"):
        sft(expert_model_parallel_size=2).apply_model_config(dense)


def test_bare_arguments_have_no_side_effects(monkeypatch):
    import os

    before = dict(os.environ)
    MegatronArguments(save="out", torch_dtype="bfloat16").apply_model_config(CONFIG)
    assert dict(os.environ) == before and not Path("out").exists()
