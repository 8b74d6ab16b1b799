"""Resolution of arguments: from a model directory, from a converted checkpoint, from args.json."""

import json
import shutil

import pytest

from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.preview import PreviewArguments
from swiftlite.arguments.train import SftArguments
from swiftlite.checkpoint.info import load_args
from swiftlite.checkpoint.resolve import as_arguments, register_custom, resolve
from swiftlite.llm import pipeline
from swiftlite.megatron.trainers.resolve import resolve_run
from swiftlite.utils.errors import CheckpointError, UsageError


@pytest.fixture
def mcore_dir(tiny_model, tmp_path):
    """What a conversion leaves next to its weights; the weights themselves are not looked at."""
    source = tiny_model("glm4_moe")
    root = tmp_path / "converted"
    root.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, root)
    args = resolve(ExportArguments(model=str(source), to_mcore=True, output_dir=str(root)))
    args.save(root)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    (root / "iter_0000001").mkdir()
    (root / "iter_0000001/metadata.json").write_text("{}")
    (root / "iter_0000001/.metadata").touch()
    return root


def test_model_directory(tiny_model):
    args = resolve(InferArguments(model=str(tiny_model("glm4_moe"))))
    assert (args.model_type, args.template, args.max_length, args.task_type) == ("glm4_5", "glm4_5", 256, "causal_lm")
    assert args.torch_dtype == str(args.model_info.torch_dtype).removeprefix("torch.")
    assert args.model_meta.architectures == ("Glm4MoeForCausalLM",)


def test_what_the_user_says_holds(tiny_model):
    args = InferArguments(model=str(tiny_model("glm4_moe")), template="qwen3", max_length=33, torch_dtype="bfloat16")
    resolve(args)
    assert (args.template, args.max_length, args.torch_dtype) == ("qwen3", 33, "bfloat16")
    assert args.given == {"model", "template", "max_length", "torch_dtype"}


@pytest.mark.parametrize("inside", ["", "iter_0000001"])
def test_converted_checkpoint_alone_knows_its_model(mcore_dir, inside):
    args = MegatronSftArguments(mcore_model=str(mcore_dir / inside), max_length=128)
    resolve_run(args)
    assert (args.model_type, args.template, args.description.padded_vocab_size) == ("glm4_5", "glm4_5", 320)
    assert (args.description.num_layers, args.description.moe_layer_pattern, args.seq_length) == (3, [0, 1, 1], 128)
    assert args.model_info.model_dir == str(mcore_dir)


def test_converted_checkpoint_keeps_a_template_that_was_chosen(mcore_dir):
    values = load_args(mcore_dir)
    values["template"] = "qwen3"
    (mcore_dir / "args.json").write_text(json.dumps(values))
    assert resolve(MegatronSftArguments(mcore_model=str(mcore_dir))).template == "qwen3"
    assert resolve(MegatronSftArguments(mcore_model=str(mcore_dir), template="glm4_5")).template == "glm4_5"


def test_foreign_checkpoint_needs_its_model(mcore_dir, tiny_model):
    (mcore_dir / "config.json").unlink()
    for named in ("Organisation/Name", "/home/somebody/model"):  # not followed: neither to a hub nor over the disk
        (mcore_dir / "args.json").write_text(json.dumps({"model": "x", "model_dir": named}))
        with pytest.raises(UsageError, match=f"no config.json.*{named}: give that with --model if you trust it"):
            resolve(MegatronSftArguments(mcore_model=str(mcore_dir)))
    (mcore_dir / "args.json").unlink()
    with pytest.raises(UsageError, match="neither args.json nor config.json; give .* with --model"):
        resolve(MegatronSftArguments(mcore_model=str(mcore_dir)))
    args = MegatronSftArguments(mcore_model=str(mcore_dir), model=str(tiny_model("glm4_moe")))
    assert resolve(args).model_type == "glm4_5"


def test_directories_of_the_wrong_kind(tiny_model, tmp_path):
    hf = str(tiny_model("glm4_moe"))
    with pytest.raises(CheckpointError, match="this is a Hugging Face directory; give it with --model"):
        resolve(MegatronSftArguments(mcore_model=hf))
    with pytest.raises(UsageError, match="no such directory"):
        resolve(MegatronSftArguments(mcore_model=str(tmp_path / "nowhere")))
    with pytest.raises(CheckpointError, match="holds neither a model nor a checkpoint"):
        resolve(MegatronSftArguments(mcore_model=str(tmp_path)))
    with pytest.raises(UsageError, match="give a model with --model"):
        resolve(InferArguments())


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_args_json(mcore_dir, text):
    (mcore_dir / "args.json").write_text(text)
    with pytest.raises(CheckpointError, match="args.json"):
        resolve(MegatronSftArguments(mcore_model=str(mcore_dir)))


def test_args_json_round_trip(mcore_dir):
    values = load_args(mcore_dir)
    assert values["model_type"] == values["template"] == "glm4_5"
    assert values["vocab_size"] == 320 and values["torch_dtype"] == "float32"
    assert load_args(mcore_dir / "iter_0000001") == {}


def test_layout_is_judged_against_the_model(mcore_dir):
    with pytest.raises(UsageError, match="3 layers cannot be divided over 2 stages"):
        resolve_run(MegatronSftArguments(mcore_model=str(mcore_dir), pipeline_model_parallel_size=2))


def test_custom_registration_runs_once(tmp_path, tiny_model):
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import pathlib\np = pathlib.Path(__file__).with_name('ran')\n"
                      "p.write_text(p.read_text() + 'x' if p.exists() else 'x')\n")  # fmt: skip
    for _ in range(2):
        resolve(InferArguments(model=str(tiny_model("glm4_moe")), external_plugins=[str(plugin)]))
    assert (tmp_path / "ran").read_text() == "x"
    with pytest.raises(UsageError, match="must be an existing .py file"):
        register_custom([str(tmp_path / "nothing.py")])


def test_model_and_template(tiny_model):
    model, template = pipeline.prepare_model_template(InferArguments(model=str(tiny_model("glm4_moe"))))
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    encoded = template.encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    assert pipeline.prepare_template(InferArguments(model=str(tiny_model("glm4_moe")))).max_length == 256


def test_arguments_or_words():
    args = InferArguments(model="DIR")
    assert as_arguments(InferArguments, args) is args
    assert as_arguments(InferArguments, ["--model", "DIR"]).model == "DIR"


def test_adapters_alone_name_their_base(tiny_model, tmp_path):
    base = tiny_model("glm4_moe")
    for name, recorded, config in (
        ("run/checkpoint-1", {"model_dir": str(base), "template": "glm4_5"}, {}),
        ("alone", None, {"base_model_name_or_path": str(base)}),
    ):
        adapter = tmp_path / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "adapter_model.safetensors").touch()
        if recorded:
            (adapter.parent / "args.json").write_text(json.dumps(recorded))
        for cls, more in (
            (InferArguments, {}),
            (ExportArguments, {"merge_lora": True}),
            (ExportArguments, {"to_mcore": True}),
        ):
            args = resolve(cls(adapters=[str(adapter)], **more))
            assert args.model_info.model_dir == str(base) and args.template == "glm4_5"
    for config, message in (
        ({"base_model_name_or_path": "org/name"}, "names 'org/name', which is not a model directory"),
        ({}, "names no model; give its base model with --model"),
        ([], "not a JSON object"),
    ):
        (tmp_path / "alone/adapter_config.json").write_text(json.dumps(config))
        with pytest.raises((UsageError, CheckpointError), match=message):
            resolve(InferArguments(adapters=[str(tmp_path / "alone")]))


def test_system_message_from_a_file(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "system.txt").write_bytes("\ufeffBe a pirate.\nAlways.\r\n".encode())
    model = str(tiny_model("glm4_moe"))

    def system(text):
        return resolve(InferArguments(model=model, system=text)).system

    assert system(str(tmp_path / "system.txt")) == system("~/system.txt") == "Be a pirate.\nAlways."
    for text in ("Be brief.", "", "Read the file notes.txt", "a.txt\nb.txt"):
        assert system(text) == text
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, reason in (("none.txt", "No such file"), ("~/latin.txt", "not UTF-8")):
        with pytest.raises(UsageError, match=rf"--system {name}: cannot be read .*{reason}"):
            system(name)


def test_what_training_recorded_holds_for_later_commands(tiny_model, tmp_path):
    """args.json next to weights, next to an adapter, in a run's root for its iterations; the user's own words rule."""
    adapter = tmp_path / "run/iter_0000003"
    adapter.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    trained = SftArguments(model=str(tiny_model("qwen2")), model_type="qwen2_5", template="qwen3", system="Be brief.",
                           use_chat_template=False)  # fmt: skip
    resolve(trained).save(adapter.parent)
    words = {"model": str(tiny_model("qwen2")), "adapters": [str(adapter)]}
    asked = resolve(InferArguments(**words))
    assert (asked.model_type, asked.template, asked.system) == ("qwen2_5", "qwen3", "Be brief.")
    assert asked.use_chat_template is False
    assert resolve(InferArguments(**words, system="Own.")).system == "Own."
    assert resolve(InferArguments(**words, template="qwen2_5")).template == "qwen2_5"
    again = resolve(SftArguments(**words, train_type="lora"))
    assert (again.template, again.use_chat_template) == ("qwen3", True)  # plain text was the first training's own
    weights = tmp_path / "weights"
    shutil.copytree(tiny_model("qwen2"), weights)
    shutil.copy(adapter.parent / "args.json", weights)
    shown = resolve(PreviewArguments(model=str(weights), dataset=["hf::any/thing"]))
    assert (shown.template, shown.system, shown.use_chat_template) == ("qwen3", "Be brief.", True)
    values = load_args(weights)
    (weights / "args.json").write_text(json.dumps({**values, "enable_thinking": "perhaps"}))
    with pytest.raises(CheckpointError, match="args.json: --enable_thinking perhaps: must be true or false"):
        resolve(InferArguments(model=str(weights)))


def test_the_chat_template_of_the_directory_is_what_every_command_writes(tiny_model, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3"), source)
    own = (
        "{% for m in messages %}<|im_start|>{{ m.role }}!\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant!\n{% endif %}"
    )
    (source / "chat_template.jinja").write_text(own)
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    for cls in (SftArguments, MegatronSftArguments, InferArguments, PreviewArguments):
        settings = {} if cls is InferArguments else {"dataset": ["x.jsonl"]}
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        settings = {key: [str(tmp_path / value) for value in values] for key, values in settings.items()}
        template = pipeline.prepare_template(cls(model=str(source), **settings))
        text, spans = template.training_text(row)
        assert text == "<|im_start|>user!\nQ<|im_end|>\n<|im_start|>assistant!\nA<|im_end|>\n"
        assert [text[start:end] for start, end, _ in spans] == ["A<|im_end|>"]
        asked = cls(model=str(source), template="qwen3", **settings)
        assert "user!" not in pipeline.prepare_template(asked).training_text(row)[0]
        assert asked.template_backend == "swift"
