"""The check at start: the registered template against the checkpoint's own Jinja."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swiftlite.llm.template import get_template
from swiftlite.llm.template.parity import PROBES, check_parity, differences
from swiftlite.utils.errors import TemplateError

sys.path.insert(0, str(Path(__file__).parent))
import official


def make(make_tokenizer, template_type, official_id, change=lambda text: text):
    tokenizer = make_tokenizer(**official.special_tokens(official_id))
    tokenizer.chat_template = change(official.jinja_text(official_id))
    return get_template(template_type, tokenizer)


@pytest.mark.parametrize("official_id", official.IDS)
def test_registered_templates_agree_with_their_jinja(make_tokenizer, official_id):
    template = make(make_tokenizer, official.template_type(official_id), official_id)
    assert list(differences(template)) == []
    check_parity(template, strict=True)


def test_first_difference_is_named(make_tokenizer, caplog, monkeypatch):
    template = make(make_tokenizer, "qwen2_5", "qwen2_5", lambda text: text.replace("You are Qwen", "You are Qwin"))
    found = list(differences(template))
    # Probes with a system message of their own agree.
    assert 0 < len(found) < len(PROBES)
    assert found[0].startswith("question: from character 29 on, template 'qwen2_5' writes 'en, created")
    assert "the checkpoint's own chat template 'in, created" in found[0]
    with pytest.raises(TemplateError, match=r"--strict_template true: question: .*without --template the checkpoint"):
        check_parity(template, strict=True)
    warned = []
    monkeypatch.setattr("swiftlite.llm.template.parity.get_logger", lambda: Recorder(warned))
    check_parity(template)
    assert len(warned) == 1 and "question" in warned[0]


class Recorder:
    def __init__(self, lines):
        self.lines = lines

    def warning(self, form, *values):
        self.lines.append(form % values)


def test_nothing_to_compare_with(make_tokenizer):
    template = get_template("qwen3", make_tokenizer(eos_token="<|im_end|>"))
    check_parity(template, strict=True)
    own = make(make_tokenizer, "chatml", "qwen3")
    assert list(differences(own))
    check_parity(get_template("chatml", own.tokenizer, template_backend="jinja"), strict=True)
