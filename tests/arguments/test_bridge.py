"""MegatronArguments -> Megatron-LM argv and extra arguments, against the recorded GLM-4.5-Air conversion."""

import argparse
import json
import pkgutil
from pathlib import Path

import pytest
import torch

from swiftlite.arguments.bridge import STOCK, STOCK_LACKS
from swiftlite.arguments.description import Described
from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.arguments.ms_swift import ARGV, EXTRA
from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.checkpoint.bind import architecture_of, convert_hf_config
from swiftlite.families import family_of, tiny_configs
from swiftlite.megatron.model import blocks as megatron_blocks
from swiftlite.utils.errors import ConfigError
from swiftlite.weights.shape import layer_pattern

GOLDEN = Path(__file__).parents[1] / "golden/glm4_5_air"


def golden(name):
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def convert(config=None, dtype="bfloat16", **changes):
    config = {**(config or golden("megatron_config_after.json")), **changes}
    return conversion_arguments(config, "<model_dir>-Debug", dtype)


def flags(argv):
    """argv -> {flag: [values]}"""
    found = {}
    for word in argv:
        if word.startswith("--"):
            current = found.setdefault(word, [])
        else:
            current.append(word)
    return found


def test_argv_equals_the_record_string_by_string():
    argv, _ = convert().parse_to_megatron()
    assert len(argv) == 176
    assert argv == golden("argv.json")


def test_extra_args_equal_the_record():
    _, extra = convert().parse_to_megatron()
    want = golden("extra_args.json")
    assert len(extra) == 37 and list(extra) == list(want)
    assert extra.pop("torch_dtype") is torch.bfloat16 and want.pop("torch_dtype") == "torch.bfloat16"
    assert extra == want
    assert {key: type(value) for key, value in extra.items()} == {key: type(value) for key, value in want.items()}


@pytest.mark.parametrize("style", ["hub", "transformers 5"])
def test_from_config_json_to_argv(style):
    """The whole way, with rope settings where either transformers version writes them; sizes follow config.json."""
    hf = golden("config.json")
    if style == "transformers 5":
        hf["rope_parameters"] = {
            "rope_type": "default", "rope_theta": hf.pop("rope_theta"),
            "partial_rotary_factor": hf.pop("partial_rotary_factor"),
        }  # fmt: skip
        hf["dtype"] = hf.pop("torch_dtype")
        del hf["rope_scaling"]
    argv, extra = convert(convert_hf_config(hf)).parse_to_megatron()
    assert argv == golden("argv.json") and extra["partial_rotary_factor"] == 0.5
    hf.update(num_hidden_layers=7, n_routed_experts=6, num_experts_per_tok=3, vocab_size=333, first_k_dense_replace=2)
    argv, extra = convert(convert_hf_config(hf)).parse_to_megatron()
    found = flags(argv)
    assert (found["--num-layers"], found["--num-experts"], found["--moe-router-topk"]) == (["7"], ["6"], ["3"])
    assert found["--moe-layer-freq"] == ["[0]*2+[1]*5"] and extra["padded_vocab_size"] == 333


def test_dtype_may_be_an_object():
    assert convert(dtype=torch.bfloat16).parse_to_megatron() == convert().parse_to_megatron()


def test_argv_follows_the_config():
    """Other layers, experts and vocabulary: exactly those flags change, with the new values."""
    before = flags(convert().parse_to_megatron()[0])
    other = convert(num_layers=5, moe_layer_freq="[0]*2+[1]*3", num_experts=6, moe_router_topk=3, padded_vocab_size=333)
    argv, extra = other.parse_to_megatron()
    after = flags(argv)
    changed = {flag: after[flag] for flag in after if after[flag] != before.get(flag)}
    assert changed == {
        "--num-layers": ["5"], "--moe-layer-freq": ["[0]*2+[1]*3"], "--num-experts": ["6"], "--moe-router-topk": ["3"],
    }  # fmt: skip
    assert set(before) == set(after) and extra["padded_vocab_size"] == 333
    assert other.description.moe_layer_pattern == [0, 0, 1, 1, 1]


def test_dense_model_has_no_expert_flags_and_tied_embeddings_follow():
    config = {key: value for key, value in golden("megatron_config_after.json").items() if "moe" not in key}
    del config["num_experts"]
    found = flags(convert(config, untie_embeddings_and_output_weights=False, qk_layernorm=True).parse_to_megatron()[0])
    assert "--num-experts" not in found and "--moe-grouped-gemm" not in found
    assert "--untie-embeddings-and-output-weights" not in found and found["--qk-layernorm"] == []
    assert "--moe-ffn-hidden-size" not in found and "--moe-router-enable-expert-bias" not in found


@pytest.mark.parametrize("dtype, flag", [("bfloat16", "--bf16"), ("float16", "--fp16"), ("float32", None)])
def test_precision_flags(dtype, flag):
    found = flags(convert(dtype=dtype).parse_to_megatron()[0])
    assert {"--bf16", "--fp16"} & set(found) == ({flag} if flag else set())


def test_fallbacks_where_the_config_is_silent():
    args = MegatronArguments()
    args.apply_model_config({"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 2})
    model = args.description
    assert (model.num_query_groups, model.norm_epsilon, model.rotary_base, model.add_qkv_bias) == (1, 1e-5, 10000, True)
    found = flags(args.parse_to_megatron()[0])
    assert "--group-query-attention" not in found and found["--attention-backend"] == ["flash"]


def test_flags_are_unique_and_rows_name_fields():
    for rows in (ARGV, EXTRA, STOCK):
        names = [row.flag for row in rows]
        assert len(names) == len(set(names))
    later = {"mcore_ref_model", "beta", "rpo_alpha", "reference_free", "label_smoothing", "f_divergence_type",
             "loss_type", "padding_free"}  # fmt: skip
    args = convert()
    for row in (*ARGV, *EXTRA):
        assert (
            row.attribute is None or row.attribute in later or hasattr(Described(args.description, args), row.attribute)
        ), row.flag


def test_every_argv_flag_exists_in_megatron_lm():
    """The recorded namespace holds every argument that Megatron-LM core_r0.13 parses."""
    known = set(golden("namespace_parsed.json"))
    renamed = {"no_masked_softmax_fusion", "no_bias_dropout_fusion", "no_bias_swiglu_fusion", "no_rope_fusion",
               "no_gradient_accumulation_fusion", "no_initialization", "disable_bias_linear", "fp8_format"}  # fmt: skip
    for row in ARGV:
        name = row.flag[2:].replace("-", "_")
        assert name in known or name in renamed, row.flag


def test_argv_needs_the_model():
    with pytest.raises(ConfigError, match="config is not applied"):
        MegatronArguments().parse_to_megatron()
    with pytest.raises(ConfigError, match="config is not applied"):
        MegatronArguments().megatron_lm_args()


# ---- stock Megatron-LM ----


def test_stock_argv_is_true_to_the_numbers():
    found = flags(convert().megatron_lm_args())
    assert found["--rotary-percent"] == ["0.5"]
    assert found["--moe-router-bias-update-rate"] == ["0.0"]
    assert "--no-rope-fusion" not in found and "--multi-latent-attention" not in found
    assert found["--num-layers"] == ["46"] and found["--moe-layer-freq"] == ["[0]*1+[1]*45"]
    assert not {"--save", "--lr", "--use-cpu-initialization"} & set(found)


def test_stock_argv_parses_with_argparse():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    argv = convert().megatron_lm_args()
    for flag, values in flags(argv).items():
        parser.add_argument(flag, nargs=len(values) or None) if values else parser.add_argument(
            flag, action="store_true"
        )
    assert parser.parse_args(argv).rotary_percent in ("0.5", ["0.5"])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096}  # fmt: skip
MLA = {"multi_latent_attention": True, "kv_lora_rank": 512, "v_head_dim": 128, "qk_head_dim": 128, "norm_epsilon": 1e-6}


def test_stock_rope_scaling():
    found = flags(convert(rope_scaling=LLAMA3).megatron_lm_args())
    assert found["--use-rope-scaling"] == [] and found["--rope-scaling-factor"] == ["8.0"]
    found = flags(convert(rope_scaling={"type": "linear", "factor": 4.0}).megatron_lm_args())
    assert found["--rotary-seq-len-interpolation-factor"] == ["4"]
    found = flags(convert(**MLA, rope_scaling=YARN).megatron_lm_args())
    assert found["--rope-type"] == ["yarn"] and found["--rotary-scaling-factor"] == ["40"]
    assert found["--no-rope-fusion"] == [] and "--num-query-groups" not in found
    assert flags(convert(**MLA).megatron_lm_args())["--rope-type"] == ["rope"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic rotary scaling"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 2.0}}, "fixes low_freq_factor at 1"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, "fixes original_max"),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "whole factors"),
        ({"rope_scaling": YARN}, "yarn rotary scaling with this attention"),
        ({**MLA, "rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast"),
        ({**MLA, "rope_scaling": LLAMA3}, "llama3 rotary scaling with latent attention"),
        ({**MLA, "norm_epsilon": 1e-5}, "one norm epsilon"),
        ({"moe_router_score_function": "softmax"}, "refuses an expert bias with softmax"),
        ({"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "moe_router_num_groups": 8,
          "moe_router_group_topk": 3}, "largest score"),
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 2}, "topk // group_topk"),
    ],
)  # fmt: skip
def test_models_that_stock_cannot_compute_get_an_explanation(changes, reason):
    text = convert(**changes).megatron_lm_args()
    assert isinstance(text, str) and reason in text and "\n" not in text


def test_every_block_is_judged():
    """A block that nobody has thought of must not be taken for what stock Megatron-LM computes."""
    blocks = {module.name for module in pkgutil.iter_modules(megatron_blocks.__path__)} - {"attention", "router"}
    assert blocks == set(STOCK_LACKS)
    by_settings = {block for block, text in STOCK_LACKS.items() if text is None}
    told = set()
    for variants in tiny_configs().values():
        for config in variants.values():
            used = set(family_of(architecture_of(config)).blocks) & by_settings
            arguments = conversion_arguments({**convert_hf_config(config), "rope_scaling": None}, "", "float32")
            told |= used if isinstance(arguments.megatron_lm_args(), str) else set()
    assert told == by_settings - {"expert_biases"}


def test_checkpoint_args_are_plain_and_agree_with_the_record():
    stored = convert().checkpoint_args()
    assert json.loads(json.dumps(stored)) == stored
    record = golden("namespace.json")
    differs = {key for key in set(stored) & set(record) if stored[key] != record[key]}
    # true to the numbers where the record relies on replaced frequencies, settings of a conversion, and TP-only padding
    assert differs == {"rotary_percent", "make_vocab_size_divisible_by", "moe_router_bias_update_rate"}
    assert len(set(stored) & set(record)) > 50


# ---- layer patterns ----


@pytest.mark.parametrize(
    "text, layers, pattern",
    [
        ("1", 3, [1, 1, 1]),
        ("2", 5, [1, 0, 1, 0, 1]),
        ("[0]*1+[1]*3", 4, [0, 1, 1, 1]),
        ("[0,1]*2", 4, [0, 1, 0, 1]),
        ("([1]*2+[0]*1)", 3, [1, 1, 0]),
        ("[0, 1, 1]", 3, [0, 1, 1]),
    ],
)
def test_layer_pattern(text, layers, pattern):
    assert list(layer_pattern(text, layers)) == pattern


@pytest.mark.parametrize("text", ["", "0", "[2]*3", "__import__('os')", "[0]*1+", "[0]*x"])
def test_layer_pattern_evaluates_nothing(text):
    with pytest.raises(ConfigError, match="moe_layer_freq"):
        layer_pattern(text, 3)


def test_pattern_of_wrong_length():
    with pytest.raises(ConfigError, match="describes 46 layers, not 4"):
        _ = convert(num_layers=4).description.moe_layer_pattern
