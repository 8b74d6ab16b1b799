"""Training from the tokenizer's own chat template: ids and labels equal those of the registered template."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from swiftlite.llm.template import get_template
from swiftlite.utils.errors import TemplateError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import official

QA = [{"role": "user", "content": "What is the capital?"}, {"role": "assistant", "content": "Paris."}]
# `render` of official and apply_chat_template differ in nothing but the day's date.
IDS = [i for i in official.IDS if i != "numina"]


@pytest.fixture
def pair(make_tokenizer):
    def make(official_id, **kwargs):
        tokenizer = make_tokenizer(**official.special_tokens(official_id))
        tokenizer.chat_template = official.jinja_text(official_id)
        name = official.template_type(official_id)
        return (get_template(name, tokenizer, template_backend=backend, **kwargs) for backend in ("swift", "jinja"))

    return make


def _conversations(rng):
    """Ordinary conversations: with and without system, tools, thoughts; several rounds."""
    words = ("Paris", "is", "nice", "你好", "🙂", "two\n\nlines", "a  b")

    def text():
        return " ".join(rng.choices(words, k=rng.randint(1, 5)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
    tools = None
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.3:
            tools = [official._TOOL]
            call = {"type": "function", "function": {"name": "f", "arguments": {"city": text(), "n": 1}}}
            messages.append({"role": "assistant", "content": rng.choice(("", text())), "tool_calls": [call]})
            messages.append({"role": "tool", "content": text()})
        answer = {"role": "assistant", "content": text()}
        if rng.random() < 0.4:
            answer["content"] = f"<think>\n{text()}\n</think>\n\n{answer['content']}"
        messages.append(answer)
    return {"messages": messages, "tools": tools}


@pytest.mark.parametrize("thinking", [None, False])
@pytest.mark.parametrize("official_id", IDS)
def test_labels_equal_those_of_the_registered_template(pair, official_id, thinking):
    swift, jinja = pair(official_id, enable_thinking=thinking)
    rng = random.Random(official_id)
    options = {} if thinking is None else {"enable_thinking": thinking}
    rows = [
        row
        for row in (_conversations(rng) for _ in range(60))
        if official.render(official_id, row["messages"], row["tools"], False, **options) is not None
    ]
    assert len(rows) >= 15
    for row, wanted, got in zip(rows, swift.encode_batch(rows), jinja.encode_batch(rows), strict=True):
        assert got["input_ids"] == wanted["input_ids"], row
        assert got["labels"] == wanted["labels"], (row, swift.training_text(row), jinja.training_text(row))


def test_generation_tags_say_what_is_learnt(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    template = get_template("jinja", tokenizer, template_backend="jinja")
    row = {
        "messages": [*QA, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No.", "loss": False}]
    }
    text, spans = template.training_text(row)
    assert text == "user: What is the capital?\nA: Paris.</s>user: And?\nA: No.</s>"
    assert [text[a:b] for a, b, _ in spans] == ["Paris.</s>"], "a message's own loss holds here too"


def test_template_without_registration_ends_with_its_own_token(make_tokenizer):
    """eos of the tokenizer is not what ends an answer here: the token that follows it in the text is."""
    tokenizer = make_tokenizer(eos_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = get_template("jinja", tokenizer, template_backend="jinja")
    text, spans = template.training_text({"messages": QA + QA})
    assert [text[a:b] for a, b, _ in spans] == ["Paris.<|im_end|>"] * 2


def test_history_that_is_written_anew(make_tokenizer):
    """Each answer's text depends on what follows it: prefixes do not help, changed contents do."""
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "n={{ messages | length }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = get_template("jinja", tokenizer, template_backend="jinja")
    text, spans = template.training_text({"messages": QA + QA})
    assert [text[a:b] for a, b, _ in spans] == ["Paris.<|im_end|>"] * 2


def test_what_cannot_be_settled_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}[{{ m.content | upper }}]{% endfor %}"
    template = get_template("jinja", tokenizer, template_backend="jinja")
    with pytest.raises(TemplateError, match="message 1 .assistant. .* cannot be settled"):
        template.encode({"messages": QA})
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(TemplateError, match="cannot write the conversation .no"):
        template.encode({"messages": QA})
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has no chat template"):
        template.encode({"messages": QA})
