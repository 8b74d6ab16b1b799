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


def _changed(make_tokenizer, official_id, *replacements):
    tokenizer = make_tokenizer(**official.special_tokens(official_id))
    tokenizer.chat_template = official.jinja_text(official_id)
    for old, new in replacements:
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    return get_template(official.template_type(official_id), tokenizer, template_backend="auto")


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}


def test_a_changed_checkpoint_template_is_what_is_trained(make_tokenizer):
    """Another end token, another default system message, other handling of thoughts, another block of tools."""
    row = {"messages": [*QA, QA[0], THOUGHT], "tools": [official._TOOL]}
    for change, expected, trained in (
        (("<|im_end|>", "<|endoftext|>"), "Paris.<|endoftext|>", "Paris.<|endoftext|>"),
        (("<tools></tools> XML tags", "<tools></tools> brackets"), "<tools></tools> brackets", "Paris.<|im_end|>"),
        (("'\\n</think>\\n\\n'", "'\\n</think>\\n'"), "hm\n</think>\nYes.", "<think>\nhm\n</think>\nYes.<|im_end|>"),
    ):  # fmt: skip
        template = _changed(make_tokenizer, "qwen3", change)
        text, spans = template.training_text(row)
        assert expected in text
        assert trained in [text[start:end] for start, end, _ in spans], change


def test_an_answer_that_the_template_moves_is_refused(make_tokenizer):
    """Every answer is printed a second time, far from where it stood: no row is trained, and none is mislabelled."""
    moved = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '' if m.role == 'assistant' else m.content }}<|im_end|>\n"
    )
    moved += "{% endfor %}{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = moved + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    template = get_template("jinja", tokenizer)
    for row in template.encode_batch([{"messages": QA * 2}, {"messages": QA}]):
        assert isinstance(row, TemplateError) and "cannot be settled" in str(row)


@pytest.mark.parametrize("official_id", IDS)
def test_one_text_a_row_finds_what_many_texts_find(make_tokenizer, official_id):
    """The short way to the answers of an untagged template is taken where it can be, and gives the same spans."""
    template = _changed(make_tokenizer, official_id)
    template._learn()
    finder = template.chat._finder({})
    rng = random.Random(official_id)
    compared = 0
    for _ in range(60):
        row = _conversations(rng)
        messages = template._with_arguments(row["messages"])
        try:
            text = template.chat.write(messages, row["tools"], False, {})
            sure = finder._surely(text, messages, row["tools"])
        except TemplateError:
            continue
        quick = finder.headers.find(text, messages) if finder.headers is not None else None
        assert quick is None or quick == sure, text
        compared += quick is not None
    assert compared > 10 or official_id in ("llama", "yi", "deepseek_r1")


@pytest.mark.parametrize("official_id", official.IDS)
def test_what_is_saved_writes_the_same_text(make_tokenizer, official_id):
    """The registered template, as chat_template.jinja read by transformers, writes what was trained."""
    tokenizer = make_tokenizer(**official.special_tokens(official_id))
    template = get_template(official.template_type(official_id), tokenizer)
    tokenizer.chat_template = template.chat.registered
    again = get_template("jinja", tokenizer)
    rng = random.Random(official_id)
    rows = []
    for _ in range(40):
        row = _conversations(rng)
        try:
            wanted = template.render(row["messages"], row["tools"], date_string="26 Jul 2024")
        except TemplateError:
            continue
        own = tokenizer.apply_chat_template(
            row["messages"], tools=row["tools"], tokenize=False, date_string="26 Jul 2024"
        )
        assert own == wanted
        rows.append(row)
    encoded = template.encode_batch(rows)
    assert encoded and again.encode_batch(rows) == encoded and all(isinstance(sample, dict) for sample in encoded)


def test_arguments_of_calls_may_be_objects_or_text(make_tokenizer):
    for official_id in ("qwen2_5", "qwen3", "llama3_1", "glm4_5", "deepseek_r1"):
        for backend in ("swift", "jinja"):
            tokenizer = make_tokenizer(**official.special_tokens(official_id))
            tokenizer.chat_template = official.jinja_text(official_id)
            template = get_template(official.template_type(official_id), tokenizer, template_backend=backend)

            def row(arguments):
                call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
                return {"messages": [QA[0], {"role": "assistant", "content": "", "tool_calls": [call]},
                                     {"role": "tool", "content": "r"}, QA[1]], "tools": [official._TOOL]}  # fmt: skip

            assert template.encode(row({"city": "Zürich"})) == template.encode(row('{"city": "Zürich"}')), official_id


def test_the_own_template_is_given_what_transformers_gives_it(make_tokenizer):
    """Null contents, thoughts under other names, tools and values inside of generation tags: as apply_chat_template."""
    tokenizer = make_tokenizer(eos_token="<|im_end|>", bos_token="<s>")
    for tag, end in (("", ""), ("{% generation %}", "{% endgeneration %}")):
        tokenizer.chat_template = (
            "{{ bos_token }}{{ tools | tojson(indent=1) }}{% set n = namespace(x=0) %}{% set text = 'outside' %}"
            "{% for m in messages %}{% set n.x = n.x + loop.index0 %}{{ m.role }}{{ n.x }}{{ m | tojson }}"
            "{% if m.role == 'assistant' %}A:" + tag + "{% set text = m.content %}{{ text }}<|im_end|>" + end + "{% endif %}"
            "{{ m.items() | list | length }}{{ m.missing }}{{ text }}{{ m.thinking }}{{ 'a b'.split()[-1].upper() }}\n"
            "{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        )  # fmt: skip
        chat = get_template("jinja", tokenizer).chat
        call = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}
        for messages in (
            QA,
            [*QA, {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "r"}],
            [
                {"role": "user", "content": "Q", "name": None},
                {"role": "assistant", "content": "A", "reasoning_content": "r"},
            ],
        ):
            for tools in (None, [], [{"type": "function", "function": {"name": "f", "parameters": {}}}]):
                for generation in (False, True):
                    wanted = tokenizer.apply_chat_template(
                        messages, tools=tools, add_generation_prompt=generation, tokenize=False
                    )
                    assert chat.write(messages, tools, generation, {}) == wanted
                    if tag and not generation:
                        assert chat.write_answers(messages, tools, {})[0] == wanted
