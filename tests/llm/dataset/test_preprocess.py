"""Rows of every known format become standard messages; the rest is refused with a reason."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest

from swiftlite.llm.dataset import RowError, preprocess

QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
SYS = {"role": "system", "content": "S"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ASKED = {"role": "user", "content": "Q"}
CALLS = {"role": "assistant", "content": ""}


def called(value):
    return {"function": {"name": "f", "arguments": {"x": value}}}


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": QA}, QA),
        ({"messages": QA, "system": "S"}, [SYS, *QA]),
        ({"messages": [SYS, *QA], "system": "other"}, [SYS, *QA]),
        ({"messages": json.dumps(QA)}, QA),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
            [SYS, *QA],
        ),
        ({"conversation": [{"human": "Q", "assistant": "A"}]}, QA),
        ({"instruction": "Q", "input": "", "output": "A"}, QA),
        ({"instruction": "Do", "input": "this", "output": "A"}, [{"role": "user", "content": "Do\nthis"}, QA[1]]),
        ({"instruction": "", "input": "Q", "output": "A"}, QA),
        ({"query": "Q", "response": "A"}, QA),
        ({"query": "Q", "response": 4}, [QA[0], {"role": "assistant", "content": "4"}]),
        (
            {"query": "Q", "response": "A", "history": [["q", "a"]], "system": "S"},
            [SYS, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, *QA],
        ),
        ({"prompt": "Q", "completion": "A"}, QA),
        ({"prompt": QA[:1], "completion": QA[1:]}, QA),
        ({"text": "A"}, QA[1:]),
        ({"messages": [QA[0], {**QA[1], "loss": False}]}, [QA[0], {**QA[1], "loss": False}]),
        (
            {"messages": [ASKED, {**QA[1], "reasoning": "T"}]},
            [ASKED, {**QA[1], "reasoning_content": "T"}],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, QA[1]], "images": None},
            QA,
        ),
    ],
)
def test_formats(row, messages):
    before = copy.deepcopy(row)
    assert preprocess(row) == {"messages": messages}
    assert row == before


def test_tool_calls_of_every_dialect():
    result = {"role": "tool", "content": "42"}
    wanted = [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, QA[1]]
    as_text = {"name": "f", "arguments": json.dumps({"x": 1})}
    for middle in (
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": as_text}]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
        {"role": "assistant", "content": None, "function_call": as_text},
        {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"x": 1}})},
        {"from": "function_call", "value": json.dumps(as_text)},
    ):
        row = {"messages": [ASKED, middle, {"role": "tool_response", "content": "42"}, QA[1]]}
        assert preprocess(row)["messages"] == wanted

    text_then_calls = [
        ASKED,
        {"role": "assistant", "content": "Wait."},
        *[{"role": "tool_call", "content": as_text}] * 2,
    ]
    messages = preprocess({"messages": text_then_calls})["messages"]
    assert messages == [ASKED, {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]}]


def test_tools_get_the_envelope():
    schema = {"name": "f", "parameters": {}}
    wanted = [{"type": "function", "function": schema}]
    for tools in ([schema], schema, json.dumps([schema]), [json.dumps(schema)], wanted):
        assert preprocess({"messages": QA, "tools": tools})["tools"] == wanted
    assert preprocess({"messages": QA, "functions": [schema]})["tools"] == wanted
    assert "tools" not in preprocess({"messages": QA, "tools": []})


def test_preference_rows():
    rejected = [QA[0], {"role": "assistant", "content": "B"}]
    for row in (
        {"messages": QA, "rejected_response": "B"},
        {"messages": QA, "rejected_messages": rejected},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"chosen": QA, "rejected": rejected},
        {"prompt": QA[:1], "chosen": QA[1:], "rejected": rejected[1:]},
    ):
        assert preprocess(row) == {"messages": QA, "rejected_messages": rejected}
    assert preprocess({"messages": QA, "label": True})["label"] is True


def test_ranked_answers_follow_the_conversation_before_them():
    rejected = [QA[0], {"role": "assistant", "content": "B"}]
    for chosen, other in (("A", "B"), (QA[1], rejected[1]), ([QA[1]], rejected[1:])):
        row = {"conversations": QA[:1], "chosen": chosen, "rejected": other}
        assert preprocess(row) == {"messages": QA, "rejected_messages": rejected}


def test_weights_of_openai():
    for weight, wanted in ((0, {"loss_scale": 0}), (1, {}), (0.5, {"loss_scale": 0.5}), (None, {})):
        assert preprocess({"messages": [QA[0], {**QA[1], "weight": weight}]})["messages"][1] == {**QA[1], **wanted}
    assert preprocess({"messages": [QA[0], {**QA[1], "weight": 0, "loss": True}]})["messages"][1]["loss"] is True


def test_questions_need_no_answer():
    for row in ({"query": "Q"}, {"messages": QA[:1]}, {"prompt": QA[:1]}, {"prompt": "Q", "chosen": None}):
        assert preprocess(row, answered=False) == {"messages": QA[:1]}
    assert preprocess({"query": "Q", "response": ""}, answered=False)["messages"][1]["content"] == ""


def test_columns_are_renamed():
    assert preprocess({"a": "Q", "b": "A"}, {"a": "query", "b": "response"}) == {"messages": QA}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not an object"),
        ({}, "no known format"),
        ({"query": "Q"}, "no known format"),
        ({"messages": []}, "messages is empty"),
        ({"messages": None, "foo": 1}, "no known format"),
        ({"messages": {"role": "user"}}, "messages is not a list"),
        ({"messages": "no json"}, "messages is text but not JSON"),
        ({"messages": ["hi"]}, "a message is not an object"),
        ({"messages": [{"content": "x"}]}, "a message has no role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
        ({"messages": QA[:1]}, "no assistant message"),
        ({"messages": [QA[0], {"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, QA[1]]}, "has images"),
        ({"query": "Q", "response": "  "}, "the last answer is empty"),
        ({"query": "Q", "response": ["A"]}, "column is not text"),
        ({"query": "Q", "response": "A", "history": ["q"]}, "history is not a list"),
        ({"messages": QA, "tools": "{"}, "tools is text but not JSON"),
        ({"messages": QA, "tools": 3}, "tools is not a list"),
        ({"messages": [ASKED, {"role": "tool_call", "content": "f(x)"}]}, "a tool call is not JSON"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a tool call has no function name"),
        ({"messages": QA, "rejected_response": 3}, "rejected answer is not text"),
        ({"query": math.nan, "response": "A"}, "no known format"),
        ({"query": "Q", "response": math.inf}, "no known format"),
        ({"query": "Q", "response": 10**5000}, "column is not text"),
        ({"messages": [QA[0], {"role": "assistant", "content": math.nan}]}, "content is not text"),
        ({"messages": [QA[0], {**QA[1], "loss": "false"}]}, "loss is not a number"),
        ({"messages": [QA[0], {**QA[1], "loss": [1]}]}, "loss is not a number"),
        ({"messages": [QA[0], {**QA[1], "loss_scale": math.nan}]}, "loss_scale is not a number"),
        ({"messages": [QA[0], {**QA[1], "weight": -1}]}, "weight is not a number"),
        ({"messages": [QA[0], {**QA[1], "name": {1: 2}}]}, "name has a key that is not text"),
        ({"messages": [ASKED, {"role": "tool_call", "content": []}, QA[1]]}, "a tool call has no function name"),
        ({"messages": [ASKED, {**CALLS, "tool_calls": [called(math.inf)]}]}, "tool call holds a number"),
        ({"messages": [ASKED, {**CALLS, "tool_calls": [called(nested(2000))]}]}, "nested too deeply"),
        ({"messages": [ASKED, {**CALLS, "tool_calls": [called(b"x")]}]}, "tool call holds a value"),
        ({"messages": QA, "tools": [{"name": "f", "parameters": {"default": math.nan}}]}, "tool holds a number"),
        ({"messages": QA, "images": ["a.png"]}, "has images"),
        ({"prompt": QA[:1], "completion": []}, "no known format|column is not text|no assistant message"),
        ({"prompt": "Q", "chosen": "A", "rejected": {"role": "assistant"}}, "content is not text"),
        ({"messages": QA[:1], "chosen": 3, "rejected": "B"}, "chosen answer is not text"),
    ],
)
def test_refused_rows(row, reason):
    with pytest.raises(RowError) as caught:
        preprocess(row)
    assert re.match(reason, caught.value.reason)
    assert "\n" not in str(caught.value)
