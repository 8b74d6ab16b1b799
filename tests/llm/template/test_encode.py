"""encode(): ids equal the tokenised official text, labels cover what the model writes and its end token."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from swiftlite.llm.template import IGNORE_INDEX, TEMPLATE_MAPPING, MaxLengthError, get_template
from swiftlite.llm.template.messages import with_arguments
from swiftlite.utils.errors import TemplateError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
import official

# The token that ends an answer. GLM-4.5: the next turn's header; NuminaMath's Jinja has none between rounds.
END_TOKENS = {
    "llama": ["</s>"],
    "llama3": ["<|eot_id|>"],
    "llama3_1": ["<|eot_id|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "ernie": ["<|end_of_sentence|>"],
    "glm4_5": ["<|user|>", "<|observation|>"],
    "numina": [],
}
# Their generation prompt opens a thought block that an answer without thoughts does not begin with.
QUOTES_ARGUMENTS = {"qwen2_5", "qwq", "llama3_1", "glm4_5"}
OPENS_THOUGHTS = {"qwq", "deepseek_r1"}
QA = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A b"}]


@pytest.fixture(scope="module")
def make_template(make_tokenizer):
    def make(official_id, **kwargs):
        tokenizer = make_tokenizer(**official.special_tokens(official_id))
        return get_template(official.template_type(official_id), tokenizer, **kwargs)

    return make


@pytest.fixture(scope="module")
def chatml(make_tokenizer):
    return lambda **kwargs: get_template("chatml", make_tokenizer(eos_token="<|im_end|>"), **kwargs)


def labelled_texts(template, encoded):
    """The text of each run of labels."""
    runs, run = [], []
    for label in [*encoded["labels"], IGNORE_INDEX]:
        if label != IGNORE_INDEX:
            run.append(label)
        elif run:
            runs.append(template.tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("official_id", official.IDS)
def test_ids_are_those_of_the_official_text(official_id, make_template):
    template = make_template(official_id)
    encoded_rows = 0
    for name, conversation in official.CONVERSATIONS.items():
        messages, tools = conversation["messages"], conversation.get("tools")
        parsed = messages
        if official_id in QUOTES_ARGUMENTS:  # JSON text is parsed first: the template would print it in quotes
            parsed = with_arguments(messages, dict)
        text = official.render(official_id, parsed, tools, False)
        if text is None:
            continue
        encoded = template.encode({"messages": messages, "tools": tools})
        added = ""
        if messages[-1]["role"] == "assistant" and official_id in ("glm4_5", "numina"):
            added = "<|user|>" if official_id == "glm4_5" else "<｜end▁of▁sentence｜>"
        assert encoded["input_ids"] == template.tokenizer(text + added, add_special_tokens=False)["input_ids"], name
        assert encoded["length"] == len(encoded["input_ids"]) == len(encoded["labels"])
        pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
        assert all(label in (IGNORE_INDEX, token) for token, label in pairs)
        encoded_rows += 1
    assert encoded_rows >= 8


@pytest.mark.parametrize("official_id", [i for i in official.IDS if i not in OPENS_THOUGHTS])
@pytest.mark.parametrize("name", ["multi_complete", "sys_multi_complete", "tools_call_complete", "whitespace_unicode"])
def test_labels_follow_the_official_generation_prompt(official_id, name, make_template):
    """A turn's labels start where the official generation prompt of the conversation before it ends."""
    template = make_template(official_id)
    conversation = official.CONVERSATIONS[name]
    messages, tools = conversation["messages"], conversation.get("tools")
    text = official.render(official_id, messages, tools, False)
    if text is None:
        pytest.skip("the official template cannot write it")
    wanted = set()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if official_id == "numina" and messages[i - 1]["role"] != "user":
            pytest.skip("its generation prompt follows user messages only")
        prompt = official.render(official_id, messages[:i], tools, True)
        assert text.startswith(prompt)
        after = official.render(official_id, messages[: i + 1], tools, False)
        ends = END_TOKENS.get(official_id, ["<|im_end|>"])
        end = len(after)
        if ends and official_id != "glm4_5":
            end = text.index(ends[0], len(prompt)) + len(ends[0])
        elif ends:
            end += next((len(e) for e in ends if text.startswith(e, end)), len("<|user|>"))
        elif i == len(messages) - 1:
            end += len("<｜end▁of▁sentence｜>")
        wanted.update(range(len(prompt), end))
    whole, spans = template.training_text({"messages": messages, "tools": tools})
    assert whole.startswith(text)
    assert {at for start, end, _ in spans for at in range(start, end)} == wanted


def test_labels_read_as_the_answers(chatml):
    """Token boundaries: answers that start or end with blanks, or with characters of several tokens."""
    template = chatml()
    rng = random.Random(1)
    pieces = (" ", "  ", "\n", "\n\n", "🙂", "é", "你好", "France", "the", "x", ".", "\t", "👩‍👩‍👧")
    for _ in range(300):
        answers = ["".join(rng.choice(pieces) for _ in range(rng.choice((1, 1, 2, 5)))) for _ in range(2)]
        messages = [
            message
            for answer in answers
            for message in (
                {"role": "user", "content": "".join(rng.choice(pieces) for _ in range(3))},
                {"role": "assistant", "content": answer},
            )
        ]
        encoded = template.encode({"messages": messages})
        for run, answer in zip(labelled_texts(template, encoded), answers, strict=True):
            # Newlines at the start of an answer may share a token with the header's newline, which is trained on then.
            assert run.endswith(f"{answer}<|im_end|>") and run.lstrip("\n") == f"{answer}<|im_end|>".lstrip("\n")


def test_a_token_shared_with_the_prompt_is_learnt(make_template):
    """ERNIE's header ends in a blank, which byte-level BPE joins to the answer's first word."""
    template = make_template("ernie")
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "capital"}]
    encoded = template.encode({"messages": messages})
    assert labelled_texts(template, encoded) == [" capital<|end_of_sentence|>"]


def test_tokenizer_without_offsets_gives_the_same_labels(make_template):
    for official_id in ("qwen2_5", "glm4_5", "ernie"):
        template, slow = make_template(official_id), make_template(official_id)

        class Slow:
            """A tokenizer that cannot give offsets."""

            is_fast = False

            def __init__(self, fast):
                self.fast = fast

            def __call__(self, text, **kwargs):
                assert isinstance(text, str) and not kwargs.get("return_offsets_mapping")
                return self.fast(text, **kwargs)

        slow.tokenizer = Slow(slow.tokenizer)
        for name in ("multi_complete", "tools_call_complete", "whitespace_unicode"):
            assert slow.encode(official.CONVERSATIONS[name]) == template.encode(official.CONVERSATIONS[name])


def test_last_turn_that_calls_a_tool_stops_at_the_observation(make_template):
    conversation = official.CONVERSATIONS["tools_call_open"]
    row = {"messages": conversation["messages"][:-1], "tools": conversation["tools"]}
    runs = labelled_texts(make_template("glm4_5"), make_template("glm4_5").encode(row))
    assert len(runs) == 1 and runs[0].endswith("</tool_call><|observation|>")


def test_thinking_off_leaves_the_empty_thought_to_the_prompt(make_template):
    row = {"messages": QA}
    for official_id, on, off in (
        ("qwen3", "<think>\n\n</think>\n\nA b<|im_end|>", "A b<|im_end|>"),
        ("glm4_5", "\n<think></think>\nA b<|user|>", "\nA b<|user|>"),
    ):
        for enable_thinking, wanted in ((None, on), (True, on), (False, off)):
            template = make_template(official_id, enable_thinking=enable_thinking)
            assert labelled_texts(template, template.encode(row)) == [wanted]
        template = make_template(official_id, loss_scale="ignore_empty_think")
        assert labelled_texts(template, template.encode(row)) == ["A b" + wanted.partition("A b")[2]]


def test_always_thinking_prompt_is_not_learnt(make_template):
    row = {"messages": [QA[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]}
    template = make_template("qwq")
    assert labelled_texts(template, template.encode(row)) == ["hm\n</think>\n\nA<|im_end|>"]


def test_loss_scale(chatml):
    row = {"messages": [*QA, {"role": "user", "content": "R"}, {"role": "assistant", "content": "C"}]}
    assert labelled_texts(chatml(), chatml().encode(row)) == ["A b<|im_end|>", "C<|im_end|>"]
    template = chatml(loss_scale="last_round")
    assert labelled_texts(template, template.encode(row)) == ["C<|im_end|>"]
    encoded = chatml(loss_scale="all").encode(row)
    assert encoded["labels"] == encoded["input_ids"]
    assert "loss_scale" not in encoded

    messages = [QA[0], {**QA[1], "loss": False}, row["messages"][2], {**row["messages"][3], "loss_scale": 0.5}]
    encoded = chatml().encode({"messages": messages})
    assert labelled_texts(template, encoded) == ["C<|im_end|>"]
    assert set(encoded["loss_scale"]) == {0.0, 0.5}
    for label, weight in zip(encoded["labels"], encoded["loss_scale"], strict=True):
        assert (label == IGNORE_INDEX) == (weight == 0)
    with pytest.raises(UsageError, match="last_round"):
        chatml(loss_scale="last")


def test_max_length(chatml):
    length = chatml().encode({"messages": QA})["length"]
    assert chatml(max_length=length).encode({"messages": QA})["length"] == length
    for strategy in ("raise", "delete"):
        with pytest.raises(MaxLengthError, match=f"{length} tokens"):
            chatml(max_length=length - 1, truncation_strategy=strategy).encode({"messages": QA})
    whole = chatml().encode({"messages": QA})["input_ids"]
    assert chatml(max_length=6, truncation_strategy="left").encode({"messages": QA})["input_ids"] == whole[-6:]
    assert chatml(max_length=6, truncation_strategy="right").encode({"messages": QA})["input_ids"] == whole[:6]


def test_open_conversation_has_no_labels(chatml):
    assert set(chatml().encode({"messages": QA[:1]})["labels"]) == {IGNORE_INDEX}


@pytest.mark.parametrize("row", [{}, {"messages": []}, {"messages": "hi"}, {"messages": [{"content": "x"}]}])
def test_rows_that_are_no_conversation(row, chatml):
    with pytest.raises(TemplateError):
        chatml().encode(row)


def test_batch_equals_single_rows_and_keeps_errors_in_place(chatml):
    rows = [{"messages": QA}, {"messages": [{"role": "user", "content": None}]}, {"messages": QA[:1]}]
    encoded = chatml().encode_batch(rows)
    assert encoded[0] == chatml().encode(rows[0]) and encoded[2] == chatml().encode(rows[2])
    assert isinstance(encoded[1], TemplateError)


@pytest.mark.parametrize("template_type", sorted(TEMPLATE_MAPPING))
def test_every_template_encodes_a_conversation(template_type, make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    template = get_template(template_type, tokenizer)
    messages = [*QA, {"role": "user", "content": "R"}, {"role": "assistant", "content": "C d"}]
    encoded = template.encode({"messages": messages})
    text, _ = template.training_text({"messages": messages})
    assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    runs = labelled_texts(template, encoded)
    assert len(runs) == 2 and "A b" in runs[0] and "C d" in runs[1]
    assert any(runs[1].endswith(stop) for stop in template.stop_words)
    prompt = template.encode_prompt(messages[:3])
    assert prompt == template.tokenize(template.render(messages[:3], add_generation_prompt=True))
    assert template.stop_token_ids == sorted(set(template.stop_token_ids)) and tokenizer.eos_token_id in (
        template.stop_token_ids
    )


def test_response_prefix_replaces_the_own_one(make_template):
    own = make_template("qwq").render(QA[:1], add_generation_prompt=True)
    template = make_template("qwq", response_prefix="So")
    assert template.encode_prompt(QA[:1]) == template.tokenize(own.removesuffix("<think>\n") + "So")


def test_parse_response(make_template):
    template = make_template("qwen3")
    assert template.parse_response("<think>\nhm\n</think>\n\nYes") == {
        "role": "assistant",
        "content": "Yes",
        "reasoning_content": "hm",
    }
    assert template.parse_response("Yes") == {"role": "assistant", "content": "Yes"}
    assert make_template("qwen2").parse_response("</think>")["content"] == "</think>"


def test_without_chat_template(chatml):
    template = chatml(use_chat_template=False)
    encoded = template.encode({"messages": [{"role": "assistant", "content": "plain text"}]})
    assert template.tokenizer.decode(encoded["input_ids"]) == "plain text<|im_end|>"
    assert encoded["labels"] == encoded["input_ids"]


def test_jinja_backend_writes_prompts(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = official.jinja_text("qwen3")
    template = get_template("chatml", tokenizer, template_backend="jinja", enable_thinking=False)
    assert template.render(QA[:1], add_generation_prompt=True) == official.render(
        "qwen3", QA[:1], None, True, enable_thinking=False
    )
