"""Which model a directory is: the seed's records, recognition by every clue, and the errors where none decides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite import families
from swiftlite.checkpoint import info
from swiftlite.checkpoint.registry import MODEL_MAPPING, get_matched_model_meta, get_model_info_meta
from swiftlite.families.records import ModelMeta, Release
from swiftlite.utils.errors import CheckpointError, ConfigError, SwiftliteError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
GLM = GOLDEN / "glm4_5_air"


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def make_dir(path: Path, config: dict[str, Any], jinja: str | None = None, tokenizer: dict | None = None) -> str:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return str(path)


def config_of(architecture: str, **values: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "vocab_size": 333, **values}


def test_glm_model_info_is_the_recorded_one(tmp_path: Path) -> None:
    config = json.loads((GLM / "config.json").read_text())
    directory = make_dir(tmp_path / "GLM-4.5-Air", config)
    model_info, _ = get_model_info_meta(directory)
    found = {k: v for k, v in dataclasses.asdict(model_info).items() if k != "explanation"}
    found |= {"torch_dtype": str(found["torch_dtype"]), "model_dir": "<model_dir>"}
    # The recorded dump was printed before these two were filled in.
    assert found.pop("config") == config
    assert found.pop("task_type") == "causal_lm"
    recorded = json.loads((GLM / "model_info.json").read_text())
    assert recorded.pop("config") is None and recorded.pop("task_type") is None
    assert found == recorded


def test_glm_model_meta_is_the_recorded_one() -> None:
    recorded = json.loads((GLM / "model_meta.json").read_text())
    meta = MODEL_MAPPING["glm4_5"]
    found = plain(dataclasses.asdict(meta))
    # Records name functions by path and hold tuples; no patterns are None, not an empty list.
    assert found.pop("get_function").endswith(":get_model_tokenizer_with_flash_attn")
    assert recorded.pop("get_function") == "<function get_model_tokenizer_with_flash_attn>"
    found["ignore_patterns"] = found["ignore_patterns"] or None
    # ms-swift's releases are in groups; the fields that nothing here reads are empty in its record.
    places: dict[str, None] = dict.fromkeys(("model_path", "ms_revision", "hf_revision"))
    models = [{"ms_model_id": ms_id, "hf_model_id": hf_id, **places} for ms_id, hf_id in (r.ids for r in meta.releases)]
    found["model_groups"] = [{"models": models, "ignore_patterns": None, "requires": None, "tags": []}]
    found |= {"model_arch": None, "additional_saved_files": [], "is_multimodal": False, "is_reward": False, "tags": []}
    assert {name: found[name] for name in recorded} == recorded


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("ZhipuAI/GLM-4.5-Air", "glm4_5"),
        ("zai-org/glm-4.5-air/", "glm4_5"),
        ("/hub/models/ZhipuAI/GLM-4___5-Air", "glm4_5"),
        ("/hf/models--Qwen--Qwen3-4B-Thinking-2507/snapshots/ab12", "qwen3_thinking"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2_5"),
        ("nobody/nothing", None),
    ],
)
def test_match_by_name(name: str, model_type: str | None) -> None:
    meta = get_matched_model_meta(name)
    assert (meta and meta.model_type) == model_type


def test_the_release_of_a_match_overrides_its_type() -> None:
    meta = get_matched_model_meta("meta-llama/Llama-2-7b-hf")
    assert meta is not None and "*.bin" in meta.ignore_patterns
    assert "*.bin" not in MODEL_MAPPING["llama"].ignore_patterns


@pytest.mark.parametrize(
    ("name", "use_hf", "instead"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", False, "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen1.5-110B-Chat-GPTQ-Int4", True, "Qwen/Qwen1.5-110B-Chat"),
        ("cognitivecomputations/DeepSeek-V3-awq", False, "deepseek-ai/DeepSeek-V3"),
        ("unsloth/Llama-3.3-70B-Instruct-bnb-4bit", True, "meta-llama/Llama-3.3-70B-Instruct"),
        ("unsloth/Llama-3.3-70B-Instruct-bnb-4bit", False, "LLM-Research/Llama-3.3-70B-Instruct"),
        ("01-ai/Yi-34B-Chat-8bits", True, "01-ai/Yi-34B-Chat"),
        ("ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf", True, "meta-llama/Llama-2-7b-hf"),
    ],
)
def test_a_quantised_release_is_refused_by_name_and_the_plain_one_is_named(
    name: str, use_hf: bool, instead: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("swiftlite.checkpoint.hub._download", lambda model_id, *_, **__: asked.append(model_id))
    with pytest.raises(UsageError, match=rf"{name} holds quantised weights.*; use {instead}$"):
        get_model_info_meta(name, use_hf=use_hf)
    assert not asked
    directory = make_dir(tmp_path / name.partition("/")[2], config_of("Glm4MoeForCausalLM"))
    assert get_model_info_meta(directory)[0].model_type == "glm4_5", "of a directory, config.json tells"


def test_the_catalogue_has_one_line_for_each_release() -> None:
    lines = (Path(families.__file__).parent / "catalogue.jsonl").read_text().splitlines()
    assert len(lines) == sum(1 + len(meta.releases) for meta in MODEL_MAPPING.values())
    ids = [release.ids for meta in MODEL_MAPPING.values() for release in meta.releases]
    assert len(set(ids)) == len(ids)
    known = {name for family in families.families() for name in (*family.architectures, *family.wrappers)}
    assert all(known.issuperset(meta.architectures) for meta in MODEL_MAPPING.values())


@pytest.mark.parametrize("jinja", ["{{ messages }}", "{% for", "{{ 1 // 0 }}"])
def test_a_chat_template_leaves_nothing_to_decide(tmp_path: Path, jinja: str) -> None:
    """It writes the text itself, whatever the type is called; nobody runs it for its name."""
    directory = make_dir(tmp_path / "checkpoint", config_of("Qwen3ForCausalLM"), jinja)
    model_info, meta = get_model_info_meta(directory)
    assert model_info.model_type is None and meta.template is None
    assert "does not matter: the text is that of its own chat template" in model_info.explanation


@pytest.mark.parametrize(
    ("name", "architecture", "model_type"),
    [
        ("my-qwen2.5-7b-tuned", "Qwen2ForCausalLM", "qwen2_5"),
        ("qwen3-4b-thinking-tuned", "Qwen3ForCausalLM", "qwen3_thinking"),
        ("qwen3-4b-tuned", "Qwen3ForCausalLM", "qwen3"),
        ("llama-3-8b-tuned", "LlamaForCausalLM", "llama3"),
        ("Llama-3.1-8B-tuned", "LlamaForCausalLM", "llama3_1"),
    ],
)
def test_a_similar_name_decides_where_there_is_no_chat_template(
    tmp_path: Path, name: str, architecture: str, model_type: str
) -> None:
    model_info, _ = get_model_info_meta(make_dir(tmp_path / name, config_of(architecture)))
    assert model_info.model_type == model_type
    elsewhere = make_dir(tmp_path / "a" / "b", config_of(architecture, _name_or_path=f"/home/user/{name}"))
    assert get_model_info_meta(elsewhere)[0].model_type == model_type


def test_config_and_special_tokens_narrow_down(tmp_path: Path) -> None:
    tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = {"added_tokens_decoder": {str(i): {"content": t} for i, t in enumerate(tokens)}}
    config = config_of("LlamaForCausalLM", vocab_size=128256, rope_theta=500000.0)
    model_info, _ = get_model_info_meta(make_dir(tmp_path / "base", config, None, tokenizer))
    assert model_info.model_type == "llama3"
    assert "special tokens" in model_info.explanation and "config.json" in model_info.explanation


def test_a_registered_name_with_another_architecture_is_not_believed(tmp_path: Path) -> None:
    directory = make_dir(tmp_path / "Qwen2.5-7B-Instruct", config_of("Glm4MoeForCausalLM"))
    assert get_model_info_meta(directory)[0].model_type == "glm4_5"


def test_a_model_saved_under_a_shared_class_keeps_its_type(tmp_path: Path) -> None:
    config = config_of("LlamaForCausalLM", model_type="internlm3")
    assert get_model_info_meta(make_dir(tmp_path / "a", config))[0].model_type == "internlm3"
    config = config_of("DeepseekForCausalLM", model_type="deepseek")  # `deepseek` is a type of another class
    assert get_model_info_meta(make_dir(tmp_path / "b", config))[0].model_type == "deepseek_moe"


def test_another_spelling_of_a_class_is_known_to_its_family(tmp_path: Path) -> None:
    directory = make_dir(tmp_path / "x", config_of("Ernie4_5ForCausalLM"))
    assert get_model_info_meta(directory)[0].model_type == "ernie"


def test_recorded_arguments_win_over_names(tmp_path: Path) -> None:
    directory = make_dir(tmp_path / "Qwen3-8B", config_of("Qwen3ForCausalLM"))
    (Path(directory) / "args.json").write_text(json.dumps({"model_type": "qwen3_thinking"}))
    assert get_model_info_meta(directory)[0].model_type == "qwen3_thinking"
    assert get_model_info_meta(directory, model_type="qwen3")[0].model_type == "qwen3"


def test_undecidable_is_an_error_that_lists_the_candidates(tmp_path: Path) -> None:
    directory = make_dir(tmp_path / "checkpoint", config_of("Qwen3ForCausalLM"))
    with pytest.raises(UsageError, match=r"qwen3, qwen3_thinking.*--model_type"):
        get_model_info_meta(directory)
    model_info, meta = get_model_info_meta(directory, need_template=False)
    assert model_info.model_type is None and meta.template is None
    assert "Qwen3ForCausalLM" in meta.architectures and "undecided" in model_info.explanation


def test_types_that_mean_the_same_need_no_decision(tmp_path: Path) -> None:
    registry = {t: ModelMeta(t, (), template="same", architectures=("XForCausalLM",)) for t in ("one", "two")}
    directory = make_dir(tmp_path / "checkpoint", config_of("XForCausalLM"))
    model_info, _ = get_model_info_meta(directory, registry=registry, templates={})
    assert model_info.model_type == "one" and "two would mean the same" in model_info.explanation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["FooForCausalLM"], "model_type": "foo"}, "FooForCausalLM.*no language model of this type"),
        ({"architectures": ["BertModel"], "model_type": "vit"}, "no language model of this type"),
        ({"architectures": None, "model_type": "nobody-knows"}, "names no architecture"),
    ],
)
def test_unsupported_architectures(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_model_info_meta(make_dir(tmp_path / "checkpoint", config_of("") | change))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("Starcoder2ForCausalLM", {"model_type": "starcoder2"}),
        ("Idefics3ForConditionalGeneration", {"model_type": "idefics3"}),  # of images and text
        ("LlavaForConditionalGeneration", {"model_type": "llava"}),  # no AutoModelForCausalLM
        ("OwnForCausalLM", {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.OwnForCausalLM"}}),
    ],
)
def test_what_transformers_builds_needs_no_record(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    model_info, meta = get_model_info_meta(make_dir(tmp_path / "x", config_of(architecture, **config)))
    assert model_info.model_type is None and meta.template is None
    assert model_info.explanation == f"{architecture} has no Megatron mapping, transformers only"


def test_a_missing_architecture_follows_from_model_type(tmp_path: Path) -> None:
    directory = make_dir(tmp_path / "x", {"model_type": "glm4_moe", "vocab_size": 5})
    assert get_model_info_meta(directory)[0].model_type == "glm4_5"


def test_directories_that_are_something_else(tmp_path: Path) -> None:
    for marker, message in (
        ("latest_checkpointed_iteration.txt", "--mcore_model"),
        ("adapter_config.json", "--adapters"),
        ("notes.txt", "no config.json"),
    ):
        directory = tmp_path / marker.replace(".", "-")
        directory.mkdir()
        (directory / marker).write_text("1")
        with pytest.raises(CheckpointError, match=message):
            get_model_info_meta(str(directory))
    broken = make_dir(tmp_path / "broken", {})
    (Path(broken) / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        get_model_info_meta(broken)


def test_unknown_type_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="--model_type qwen2.5.*qwen2_5"):
        get_model_info_meta("anything", model_type="qwen2.5")


def test_dtype_comes_from_the_user_then_the_type_then_the_config(tmp_path: Path) -> None:
    def dtype(folder: str, meta_dtype: str | None = None, **given: Any) -> torch.dtype:
        stated = {"torch_dtype": "float16"} if folder == "old" else {"dtype": "float16"} if folder == "new" else {}
        registry = {"x": ModelMeta("x", (), architectures=("X",), torch_dtype=meta_dtype)}
        path = tmp_path / folder
        directory = str(path) if path.exists() else make_dir(path, config_of("X", **stated))
        return get_model_info_meta(directory, registry=registry, templates={}, **given)[0].torch_dtype

    assert dtype("old", "bfloat16", torch_dtype="fp32") is torch.float32
    assert dtype("old", "bfloat16", torch_dtype=torch.float16) is torch.float16
    assert dtype("old", "bfloat16") is torch.bfloat16
    assert dtype("old") is torch.float16
    assert dtype("new") is torch.float16
    assert dtype("none") is info.default_dtype()
    with pytest.raises(UsageError, match="--torch_dtype int8"):
        dtype("old", torch_dtype="int8")


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_type": "yarn", "factor": 4.0},
        ),
    ],
)
def test_rope_scaling_in_both_spellings(config: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    assert info.rope_scaling(config) == scaling


def test_two_values_of_a_rope_setting_are_refused_by_every_command(tmp_path: Path) -> None:
    """Releases of transformers read different ones. Settings by kind of layer are the model's own matter."""
    layers = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config = config_of("Qwen2ForCausalLM") | {"rope_theta": 1e4}
    find = {"model_type": "qwen2_5"}
    get_model_info_meta(make_dir(tmp_path / "layers", config | {"rope_parameters": layers}), **find)
    get_model_info_meta(make_dir(tmp_path / "same", config | {"rope_parameters": {"rope_theta": 10000}}), **find)
    directory = make_dir(tmp_path / "two", config | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    with pytest.raises(ConfigError, match=r"two values of rope_theta: 10000.0 .* and 1000000.0"):
        get_model_info_meta(directory, **find)


def test_max_length_is_the_smallest_stated() -> None:
    assert info.max_model_len({"max_position_embeddings": 4096, "seq_length": 2048}) == 2048
    assert info.max_model_len({"text_config": {"max_position_embeddings": 64}}) == 64
    assert info.max_model_len({}) is None


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, ("gptq", 4)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", 8)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("bnb", 4)),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
            ("compressed-tensors", 8),
        ),
        (None, (None, None)),
    ],
)
def test_quantization(entry: dict[str, Any] | None, expected: tuple[str | None, int | None]) -> None:
    assert info.quantization({"quantization_config": entry}) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["Glm4MoeForCausalLM"]}, True),
        ({"architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}, True),
        ({"architectures": ["Qwen3ForCausalLM"], "num_experts": 0}, False),
    ],
)
def test_is_moe(config: dict[str, Any], expected: bool) -> None:
    assert info.is_moe(config) is expected


def test_requirements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_dir(tmp_path / "x", config_of("X"))

    def find(*requires: str, **kwargs: Any) -> None:
        registry = {"x": ModelMeta("x", (), architectures=("X",), requires=requires)}
        get_model_info_meta(directory, registry=registry, templates={}, **kwargs)

    find("torch>=2", "transformers>=4.57")
    with pytest.raises(SwiftliteError, match=r"x needs torch>=99.*pip install 'torch>=99'"):
        find("torch>=99")
    with pytest.raises(SwiftliteError, match="no such package"):
        find("a-package-nobody-has>=1")
    find("torch>=99", ignore_requirements=True)
    assert "needs torch>=99" in capsys.readouterr().err
    find("transformers<4.49")  # speaks of remote code that today's transformers replaces


def test_ids_of_the_other_hub_are_translated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    directory = make_dir(tmp_path / "x", config_of("X"))
    registry = {"x": ModelMeta("x", (Release("ms/name", "hf/name"),), architectures=("X",))}
    monkeypatch.setattr("swiftlite.checkpoint.hub.fetch", lambda model_id, **_: asked.append(model_id) or directory)
    for given in ("ms/name", "hf/name"):
        for use_hf in (False, True):
            get_model_info_meta(given, use_hf=use_hf, registry=registry, templates={})
    assert asked == ["ms/name", "hf/name", "ms/name", "hf/name"]


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("GLM-4.7", {"architectures": ["Glm4MoeForCausalLM"]}, "glm4_7"),
        ("my-GLM-4.6-tuned", {"architectures": ["Glm4MoeForCausalLM"]}, "glm4_6"),
        ("mine", {"architectures": ["Glm4MoeForCausalLM"]}, "glm4_5"),
        ("DeepSeek-V3.1-Terminus", {"architectures": ["DeepseekV3ForCausalLM"]}, "deepseek_v3_1"),
        ("mine", {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}, "kimi_k2"),
        ("Kimi-K2-Instruct", {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2"}, "moonlight"),
    ],
)
def test_later_releases_are_known_by_name(name: str, config: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """A model of another name is what it was before they came out, unless config.json says more."""
    directory = make_dir(tmp_path / name, {**config, "vocab_size": 333})
    info, meta = get_model_info_meta(directory)
    assert meta.model_type == expected
