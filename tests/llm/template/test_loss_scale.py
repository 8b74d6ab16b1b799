"""Which tokens are trained on and how much: strategies, patterns, chains, thoughts, long rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from swiftlite.llm.dataset import EncodedDataset
from swiftlite.llm.template import get_template
from swiftlite.llm.template.base import MaxLengthError
from swiftlite.llm.template.loss_scale import PATTERNS, parse_loss_scale, register_loss_scale
from swiftlite.utils.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent))
import official

ASKED = {"role": "user", "content": "Q"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}
PLAIN = {"role": "assistant", "content": "No."}
TWO = [ASKED, PLAIN, ASKED, {"role": "assistant", "content": "Yes."}]


@pytest.fixture
def trained(make_tokenizer):
    """[(text, weight)] of the spans with a loss."""

    def get(messages, loss_scale="default", official_id="qwen3", **kwargs):
        tokenizer = make_tokenizer(**official.special_tokens(official_id))
        template = get_template(official.template_type(official_id), tokenizer, loss_scale=loss_scale, **kwargs)
        text, spans = template.training_text({"messages": messages})
        return [(text[a:b], weight) for a, b, weight in spans]

    return get


def test_strategies(trained):
    no, yes = "No.<|im_end|>", "<think>\n\n</think>\n\nYes.<|im_end|>"
    assert trained(TWO) == trained(TWO, "base") == [(no, 1.0), (yes, 1.0)]
    assert trained(TWO, "last_round") == [(yes, 1.0)]
    assert trained(TWO, "last_round+ignore_empty_think") == [("Yes.<|im_end|>", 1.0)]
    assert trained(TWO, "ignore_empty_think") == [(no, 1.0), ("Yes.<|im_end|>", 1.0)]
    ((everything, weight),) = trained(TWO, "all")
    assert everything.startswith("<|im_start|>user\nQ") and everything.endswith("<|im_end|>\n") and weight == 1.0


def test_thoughts_with_and_without_loss(trained):
    messages = [ASKED, THOUGHT]
    assert trained(messages) == [("<think>\nhm\n</think>\n\nYes.<|im_end|>", 1.0)]
    assert trained(messages, "ignore_empty_think") == trained(messages)
    assert trained(messages, "ignore_think") == [("Yes.<|im_end|>", 1.0)]
    # Where the generation prompt opens the thoughts, they have no opening tag of their own.
    assert trained(messages, "ignore_think", official_id="qwq") == [("Yes.<|im_end|>", 1.0)]
    assert trained(messages, "ignore_think", official_id="glm4_5") == [("Yes.<|user|>", 1.0)]


def test_per_message_weights(trained):
    half, none = {**PLAIN, "loss_scale": 0.5}, {**PLAIN, "loss": False}
    assert trained([ASKED, none, ASKED, half]) == [("<think>\n\n</think>\n\nNo.<|im_end|>", 0.5)]
    assert trained([ASKED, {**PLAIN, "loss": True}, ASKED, PLAIN], "last_round")[0] == ("No.<|im_end|>", 1.0)


def test_patterns_and_chains(trained, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [ASKED, {"role": "assistant", "content": "Wait.", "tool_calls": [call]}]
    call_text = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert trained(messages, "hermes+ignore_empty_think") == [
        ("Wait.\n", 1.0), (call_text, 2.0), ("<|im_end|>", 1.0),
    ]  # fmt: skip
    react = {
        "role": "assistant",
        "content": "Thought: go\nAction: f\nAction Input: {}\nObservation: 4\nFinal Answer: 4",
    }
    parts = trained([ASKED, react], "react+ignore_empty_think")
    assert parts == [
        ("Thought:", 1.0), (" go\n", 1.0), ("Action:", 2.0), (" f\n", 2.0), ("Action Input:", 2.0), (" {}\n", 2.0),
        ("Observation:", 2.0), ("Final Answer:", 1.0), (" 4<|im_end|>", 1.0),
    ]  # fmt: skip
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({r"\d+": [3.0], "Wait": [0.5, 0.5]}))
    weighed = trained(
        [ASKED, {"role": "assistant", "content": "a 12 Wait b 3"}], f"last_round+{file}+ignore_empty_think"
    )
    assert weighed == [
        ("a ", 1.0), ("12", 3.0), (" ", 1.0), ("Wait", 0.5), (" b ", 0.5), ("3", 3.0), ("<|im_end|>", 1.0),
    ]  # fmt: skip
    # Weights of a chain are multiplied.
    chained = trained([ASKED, {**react, "loss_scale": 0.5}], "react+alpha_umi+ignore_empty_think")
    assert ("Action:", 2.0) in chained and ("Thought:", 0.5) in chained


def test_tokens_have_the_weight_of_their_text(make_tokenizer):
    template = get_template("chatml", make_tokenizer(eos_token="<|im_end|>"), loss_scale="default+hermes")
    row = {"messages": [ASKED, {"role": "assistant", "content": "Hi. <tool_call>{x}</tool_call>"}]}
    encoded = template.encode(row)
    twice = [i for i, w in zip(encoded["input_ids"], encoded["loss_scale"], strict=True) if w == 2.0]
    assert template.tokenizer.decode(twice) == "<tool_call>{x}</tool_call>"
    assert [label != -100 for label in encoded["labels"]] == [weight > 0 for weight in encoded["loss_scale"]]


def test_unknown_names_and_wrong_files(tmp_path):
    with pytest.raises(UsageError, match="'hermse' is unknown; did you mean hermes"):
        parse_loss_scale("default+hermse")
    with pytest.raises(UsageError, match="cannot be read"):
        parse_loss_scale(str(tmp_path / "none.json"))
    for content, what in (("[]", "must be an object"), ('{"(": [1]}', "not a regular expression"),
                          ('{"x": [1, 2, 3]}', "one or two numbers"), ('{"x": [-1]}', "0 or more")):  # fmt: skip
        (tmp_path / "w.json").write_text(content)
        with pytest.raises(UsageError, match=what):
            parse_loss_scale(str(tmp_path / "w.json"))
    register_loss_scale("mine", {"x": [2.0]})
    assert parse_loss_scale("all+mine") == ("all", [{"x": [2.0]}])
    del PATTERNS["mine"]


def test_non_thinking_prefix(trained):
    assert trained([ASKED, PLAIN], add_non_thinking_prefix=False) == [("No.<|im_end|>", 1.0)]
    assert trained([ASKED, PLAIN], official_id="glm4_5") == [("\n<think></think>\nNo.<|user|>", 1.0)]
    assert trained([ASKED, PLAIN], official_id="glm4_5", add_non_thinking_prefix=False) == [("\nNo.<|user|>", 1.0)]
    # Thoughts are left alone.
    assert trained([ASKED, THOUGHT], add_non_thinking_prefix=False) == trained([ASKED, THOUGHT])
    # With thinking off the block belongs to the prompt, and stays.
    assert trained([ASKED, PLAIN], enable_thinking=False, add_non_thinking_prefix=False) == [("No.<|im_end|>", 1.0)]


def test_split_makes_several_samples(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    template = get_template("chatml", tokenizer, max_length=16, truncation_strategy="split", use_chat_template=False)
    rows = [{"messages": [{"role": "assistant", "content": "one two three " * 20}]},
            {"messages": [{"role": "assistant", "content": "short"}]}]  # fmt: skip
    whole = get_template("chatml", tokenizer, use_chat_template=False).encode(rows[0])
    dataset = EncodedDataset(rows, template)
    pieces = [dataset[i] for i in range(len(dataset) - 1)]
    assert [i for piece in pieces for i in piece["input_ids"]] == whole["input_ids"]
    assert [piece["length"] for piece in pieces[:-1]] == [16] * (len(pieces) - 1) and 0 < pieces[-1]["length"] <= 16
    assert dataset.row_indices == [0] * len(pieces) + [1]
    assert dataset.report.total == 2 and not dataset.report.dropped
    with pytest.raises(MaxLengthError):
        template.encode(rows[0])
