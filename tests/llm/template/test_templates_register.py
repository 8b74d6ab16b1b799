"""The template registry: the seed's record, look-ups, late registration, variants."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from swiftlite.families.records import TemplateMeta
from swiftlite.llm.template import (
    TEMPLATE_CLASSES,
    TEMPLATE_MAPPING,
    Template,
    ThinkingTemplate,
    get_template,
    get_template_meta,
    register_template,
    register_template_class,
)
from swiftlite.llm.template.registered import source_of
from swiftlite.utils.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))
import official

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENIZER = SimpleNamespace(bos_token="<s>", eos_token="</s>")


@pytest.fixture(autouse=True)
def restore_registry():
    saved = dict(TEMPLATE_MAPPING), dict(TEMPLATE_CLASSES)
    yield
    for mapping, before in zip((TEMPLATE_MAPPING, TEMPLATE_CLASSES), saved, strict=True):
        mapping.clear()
        mapping.update(before)


def test_glm4_5_record():
    wanted = json.loads((GOLDEN / "glm4_5_air" / "template_meta.json").read_text())
    # The record prints the class itself: <class '...ThinkingTemplate'>.
    wanted["template_cls"] = wanted["template_cls"].rstrip("'>").rpartition(".")[2]
    record = get_template_meta("glm4_5").describe()
    assert record == wanted
    assert list(record) == list(wanted) and len(record) == 12


def test_template_kwargs_of_the_record_are_accepted():
    kwargs = json.loads((GOLDEN / "glm4_5_air" / "template_kwargs.json").read_text())
    template = get_template("glm4_5", TOKENIZER, **kwargs)
    assert type(template) is ThinkingTemplate and template.max_length == 2048


def test_every_meta_is_complete():
    for name, meta in TEMPLATE_MAPPING.items():
        assert name == meta.template_type
        assert meta.template_cls in TEMPLATE_CLASSES
        assert re.search(r"\{%-? *generation *-?%\}", source_of(meta))
        assert any("{{QUERY}}" in part for part in meta.prompt)


def test_unknown_template_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean qwen2_5"):
        get_template("qwen25", TOKENIZER)
    with pytest.raises(UsageError, match="known: .*chatml"):
        get_template("zzzz", TOKENIZER)


def test_late_registration():
    meta = TemplateMeta("mine", prefix=("<s>",), prompt=("U:{{QUERY}} A:",), chat_sep=("\n",), suffix=("</s>",))
    register_template(meta)
    messages = [
        {"role": "user", "content": "{{QUERY}}"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "2"},
    ]
    assert get_template("mine", TOKENIZER).render(messages) == "<s>U:{{QUERY}} A:1\nU:q A:2</s>"
    with pytest.raises(UsageError, match="registered already"):
        register_template(meta)
    register_template(TemplateMeta("mine", (), ("{{QUERY}}",), None), exist_ok=True)
    assert get_template("mine", TOKENIZER).render(messages[:2]) == "{{QUERY}}1</s>"


def test_own_class():
    class Shouting(Template):
        def parse_response(self, text):
            return {"role": "assistant", "content": text.upper()}

    register_template_class("Shouting", Shouting)
    register_template(TemplateMeta("loud", (), ("{{QUERY}}",), None, template_cls="Shouting"))
    assert get_template("loud", TOKENIZER).parse_response("hi")["content"] == "HI"
    register_template(TemplateMeta("lost", (), ("{{QUERY}}",), None, template_cls="Nowhere"))
    with pytest.raises(UsageError, match="Nowhere"):
        get_template("lost", TOKENIZER)


def test_the_checkpoints_own_template_is_used_unless_another_is_asked_for(make_tokenizer):
    tokenizer = make_tokenizer(**official.special_tokens("qwen3_instruct_2507"))
    assert not get_template("qwen3", tokenizer, template_backend="auto").chat.is_own
    tokenizer.chat_template = official.jinja_text("qwen3_instruct_2507")
    own = get_template("qwen3", tokenizer, template_backend="auto")
    assert own.chat.source() == tokenizer.chat_template and own.template_backend == "jinja"
    assert get_template(None, tokenizer).chat.is_own  # model_meta.template of a model that may be of several types
    asked = get_template("qwen3", tokenizer)
    answered = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert "<think>" in asked.training_text({"messages": answered})[0]
    assert "<think>" not in own.training_text({"messages": answered})[0]


def test_wrong_values_are_named():
    for kwargs in (
        {"truncation_strategy": "drop"},
        {"padding_side": "middle"},
        {"template_backend": "mustache"},
        {"agent_template": "hermes"},
    ):
        with pytest.raises(UsageError, match=next(iter(kwargs))):
            get_template("glm4_5", TOKENIZER, **kwargs)
    assert get_template("glm4_5", TOKENIZER, agent_template="glm4_5")


def test_rounds_layout_follows_the_parts():
    dated = get_template("skywork_o1", TOKENIZER).render([{"role": "user", "content": "Q"}], date_string="01 Jan 2030")
    assert dated.startswith(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 01 Jan 2030\n\nYou are Skywork-o1"
    )
    sus = get_template("sus", TOKENIZER)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert sus.render(messages) == "S### Human: ab\n\n### Assistant: c<|endoftext|>"
    assert get_template("mengzi", TOKENIZER).render(messages[:2]) == "指令：S输入：a输出：\n"


def test_own_bos_of_the_tokenizer_is_written(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    template = get_template("openbuddy", tokenizer, default_system="S")
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert template.render(messages) == "<s>S\n\nUser: Q\nAssistant:A</s>"
    assert template.encode({"messages": messages})["input_ids"][0] == tokenizer.bos_token_id


def test_import_is_light():
    code = (
        "import sys, swiftlite.llm.template, swiftlite.llm.dataset;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'jinja2', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
