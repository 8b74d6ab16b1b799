"""A checkpoint's chat template that loops, allocates or fails ends within bounds, wherever it is written."""

from __future__ import annotations

import time

import pytest

from swiftlite.llm.template import get_template
from swiftlite.llm.template.parity import differences
from swiftlite.utils import bounded
from swiftlite.utils.bounded import BoundedChild, LimitError, run_bounded
from swiftlite.utils.errors import TemplateError, UsageError

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
HOSTILE = {
    "loop": LOOP,
    "memory": "{{ 'a' * 20000000000 }}",
    "doubling": DOUBLE,
    "power": "{{ 10 ** (10 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 // 0 }}",
    "syntax": "{% for",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in ("swiftlite.utils.bounded", "swiftlite.llm.template.jinja"):
        monkeypatch.setattr(f"{module}.SECONDS", 0.3)
    monkeypatch.setattr(bounded, "_MEMORY_BYTES", 2**28)


def test_results_and_errors_come_back():
    assert run_bounded(lambda: {"a": [1, "x" * 300_000]}) == {"a": [1, "x" * 300_000]}

    def refuse():
        raise TemplateError("no")

    with pytest.raises(TemplateError, match="no"):
        run_bounded(refuse)
    with pytest.raises(LimitError, match="ZeroDivisionError"):
        run_bounded(lambda: 1 // 0)
    started = time.process_time()
    with pytest.raises(LimitError, match="more than 0.3 s"):
        run_bounded(lambda: [None for _ in iter(int, 1)])
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_bounded(name, make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = HOSTILE[name]
    template = get_template("qwen3", tokenizer)  # has variants, which are tried
    list(differences(template))
    assert template.encode({"messages": QA})["length"] > 0
    jinja = get_template("jinja", tokenizer)
    with pytest.raises(TemplateError, match="cannot write the conversation"):
        jinja.render(QA)
    with pytest.raises((TemplateError, UsageError), match="cannot write|cannot be used"):
        jinja.encode({"messages": QA})


def test_a_row_that_makes_the_template_loop_costs_itself(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    plain = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    plain = plain.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    )
    tokenizer.chat_template = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}" + plain
    template = get_template("jinja", tokenizer)
    rows = [{"messages": QA}, {"messages": [{"role": "user", "content": "loop"}, QA[1]]}, {"messages": QA}]
    first, second, third = template.encode_batch(rows)
    assert first == third and first["length"] > 0
    assert isinstance(second, TemplateError) and "0.3 s" in str(second)
    for _ in range(2):  # alone too, whatever the template has written before
        with pytest.raises(TemplateError, match="cannot write it: .*0.3 s"):
            template.encode(rows[1])
        with pytest.raises(TemplateError, match="cannot write the conversation: .*0.3 s"):
            template.training_text(rows[1])
        assert template.encode(rows[0]) == first
    with pytest.raises(UsageError, match="chat template cannot be used"):
        template.encode_batch([rows[1]] * 5)


def test_a_child_answers_many_requests_and_is_made_anew_after_one_out_of_bounds():
    child = BoundedChild(lambda n: [n] * n if n < 1000 else [None for _ in iter(int, 1)])
    assert list(child.ask([1, 2, 100])) == [[1], [2] * 2, [100] * 100]
    assert list(child.ask([0])) == [[]]
    answers = child.ask([3, 1000, 4])
    assert next(answers) == [3] * 3
    with pytest.raises(LimitError, match="more than 0.3 s"):
        next(answers)
    assert not child.is_ready
    half = BoundedChild(lambda n: n)
    left = half.ask([1, 2])
    assert next(left) == 1 and not half.is_ready  # what is left must not answer another request
    left.close()
    assert not half.end.alive
    with pytest.raises(LimitError, match="more than 0.2 s"):
        list(BoundedChild(lambda _: [None for _ in iter(int, 1)]).ask([None], 0.2))


def test_constants_of_a_hostile_template_are_computed_in_a_child(make_tokenizer):
    """Jinja computes them when it compiles, and when it looks for the names that a template reads."""
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ 'x' * 10 ** 12 }}{{ 10 ** (10 ** 9) }}"
    began = time.process_time()
    template = get_template("jinja", tokenizer)
    assert not template.chat.prints_tools() and not template.chat.prints_calls()
    with pytest.raises(TemplateError, match="cannot write the conversation"):
        template.render(QA)
    assert time.process_time() - began < 0.5


def test_rows_after_a_failure_in_the_middle_are_their_own(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    template = get_template("jinja", tokenizer)
    rows = [{"messages": [QA[0], {"role": "assistant", "content": f"number {n}"}]} for n in range(100)]
    wanted = [template.training_text(row)[0] for row in rows[98:]]
    writer = template.writer()
    parts = writer(rows)
    assert len(next(parts)) == 32
    assert [text for part in writer(rows[98:]) for text, _ in part] == wanted
    writer.close()
