"""--agent_template hermes: tools for templates that have no format of their own."""

from __future__ import annotations

import pytest

from swiftlite.llm.template import get_template
from swiftlite.utils.errors import TemplateError, UsageError

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
MESSAGES = [
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Done."},
]
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize("name", ["llama3", "chatml", "megrez", "openbuddy2", "moonlight"])
def test_calls_are_written_and_learnt(make_tokenizer, name):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    row = {"messages": [{"role": "system", "content": "S"}, *MESSAGES], "tools": [TOOL]}
    template = get_template(name, tokenizer, agent_template="hermes")
    text, spans = template.training_text(row)
    trained = [text[a:b] for a, b, _ in spans]
    assert trained[0].startswith(f"Wait.\n{CALL_TEXT}\n{CALL_TEXT}") and trained[1].startswith("Done.")
    assert len(trained) == 2
    assert "S\n\n# Tools" in text and '"name": "f", "parameters"' in text
    assert "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>" in text
    row["messages"][2] = {**row["messages"][2], "loss": False}
    text, spans = template.training_text(row)
    assert [text[a:b][:5] for a, b, _ in spans] == ["Done."], "weights stay with their message"
    # Without tools nothing changes.
    assert template.render(MESSAGES[:1]) == get_template(name, tokenizer).render(MESSAGES[:1])


def test_the_default_system_message_and_none(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="</s>")
    plain = get_template("chatml", tokenizer, agent_template="hermes", default_system="D")
    assert plain.render(MESSAGES[:1], [TOOL]).startswith("<|im_start|>system\nD\n\n# Tools")
    text, spans = get_template("chatml", tokenizer, agent_template="hermes").training_text(
        {"messages": MESSAGES, "tools": [TOOL]}
    )
    assert text.startswith("<|im_start|>system\n# Tools")
    assert [text[a : a + 4] for a, _, _ in spans] == ["Wait", "Done"]


def test_where_it_is_refused(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="</s>")
    with pytest.raises(UsageError, match="writes tools as its model's own chat template does"):
        get_template("llama3_2", tokenizer, agent_template="hermes")
    with pytest.raises(UsageError, match="can write tools as hermes"):
        get_template("megrez", tokenizer, agent_template="toolbench")
    with pytest.raises(TemplateError, match="--agent_template hermes"):
        get_template("megrez", tokenizer).encode({"messages": MESSAGES})
