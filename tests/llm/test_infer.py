"""Inference on tiny models: one prompt, a dataset, a chat; streaming and batches give what generate gives."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.parser import parse
from swiftlite.llm import infer
from swiftlite.utils.errors import DatasetError, TemplateError, UsageError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("qwen2"))


def arguments(model_dir: str, *words: str) -> InferArguments:
    common = ["--model", model_dir, "--model_type", "qwen2", "--temperature", "0", "--max_new_tokens", "12"]
    return parse(InferArguments, [*common, *words])


def make_generator(model_dir: str, *words: str) -> infer.Generator:
    """A generator whose model says only words that begin with a blank, so that its random answers are text."""
    generator = infer.Generator.from_arguments(arguments(model_dir, *words))
    tokenizer = generator.template.tokenizer
    vocab = [tokenizer.convert_ids_to_tokens(i) or "" for i in range(generator.model.config.vocab_size)]
    silent = torch.tensor([not (t.startswith("\u0120") and t[1:].isascii() and t[1:].isalpha()) for t in vocab])
    generator.model.lm_head.register_forward_hook(lambda _m, _i, out: out.masked_fill(silent, -1e9))
    return generator


@pytest.fixture(scope="module")
def generator(model_dir: str) -> infer.Generator:
    return make_generator(model_dir)


def greedy(generator: infer.Generator, messages: list[dict[str, Any]], count: int = 12) -> list[int]:
    """The most likely tokens, one forward pass each."""
    ids = generator.template.encode_prompt(messages)
    answer: list[int] = []
    while len(answer) < count:
        logits = generator.model(torch.tensor([ids + answer])).logits[0, -1]
        token = int(logits.argmax())
        if token in generator.template.stop_token_ids:
            break
        answer.append(token)
    return answer


def test_end_tokens_of_the_template_and_of_the_generation_config(generator: infer.Generator) -> None:
    before = generator.model.generation_config.eos_token_id
    own: Any
    for own, ids in ((None, []), (7, [7]), ([7, 9], [7, 9])):
        generator.model.generation_config.eos_token_id = own
        assert generator._config(5).eos_token_id == sorted({*generator.template.stop_token_ids, *ids})
    generator.model.generation_config.eos_token_id = before


def test_answers_are_the_most_likely_tokens(generator: infer.Generator) -> None:
    with torch.no_grad():
        tokens = greedy(generator, QUESTION)
    expected = generator.template.tokenizer.decode(tokens, skip_special_tokens=True)
    assert expected
    assert generator.answer([QUESTION]) == [expected]
    assert "".join(generator.stream(QUESTION)) == expected


def test_a_batch_gives_each_its_own_answer(generator: infer.Generator) -> None:
    other = [{"role": "user", "content": "Hello, fox!"}]
    assert generator.answer([QUESTION, other]) == [*generator.answer([QUESTION]), *generator.answer([other])]


def test_stop_words_end_the_answer_and_are_cut(model_dir: str, generator: infer.Generator) -> None:
    full = generator.answer([QUESTION])[0]
    word = full[4:8]
    stopped = make_generator(model_dir, "--stop_words", word)
    expected = full[: full.index(word)]
    assert stopped.answer([QUESTION]) == [expected]
    assert "".join(stopped.stream(QUESTION)) == expected


def test_the_longest_conversation_limits_the_answer(generator: infer.Generator) -> None:
    room = replace(generator, max_model_len=12)
    assert (room._config(5).max_new_tokens, replace(room, max_new_tokens=3)._config(5).max_new_tokens) == (7, 3)
    assert replace(room, max_new_tokens=30)._config(5).max_new_tokens == 7
    with pytest.raises(TemplateError, match="the conversation has 12 tokens, the model holds 12"):
        room._config(12)


def test_sampling_flags_without_sampling(generator: infer.Generator, caplog: pytest.LogCaptureFixture) -> None:
    assert replace(generator, top_p=0.5, temperature=1.0)._config(5).top_p == 0.5 and not caplog.text
    assert replace(generator, top_p=0.5, top_k=4, temperature=0.0)._config(5).top_p is None
    assert "--top_p, --top_k: no effect, the most likely token is taken; sample with --temperature 1" in caplog.text


def test_leaving_a_stream_ends_the_generation(model_dir: str) -> None:
    generator = make_generator(model_dir, "--max_new_tokens", "200")
    steps = 0
    forward = generator.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(*args, **kwargs)

    generator.model.forward = counted
    pieces = generator.stream(QUESTION)
    next(pieces)
    pieces.close()
    assert 0 < steps < 200


def test_errors_of_the_generation_reach_the_caller(model_dir: str) -> None:
    generator = make_generator(model_dir)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of order")

    generator.model.forward = broken
    with pytest.raises(RuntimeError, match="out of order"):
        list(generator.stream(QUESTION))


@pytest.mark.parametrize("stream", ["true", "false"])
def test_prompt(
    model_dir: str,
    generator: infer.Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stream: str,
) -> None:
    monkeypatch.setattr(infer.Generator, "from_arguments", lambda _args: generator)
    infer.infer_main(arguments(model_dir, "--prompt", QUESTION[0]["content"], "--stream", stream))
    assert capsys.readouterr().out == generator.answer([QUESTION])[0] + "\n"


def test_data_set(model_dir: str, generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(infer.Generator, "from_arguments", lambda _args: generator)
    rows = [
        {"messages": [*QUESTION, {"role": "assistant", "content": "Paris."}], "id": 7},
        {"query": "Hello, fox!", "system": "You are a fox."},
        {"query": "And?", "history": [["Hello", "Good day"]]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
    ]
    source, result = tmp_path / "rows.jsonl", tmp_path / "made" / "result.jsonl"
    source.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    infer.infer_main(
        arguments(model_dir, "--val_dataset", str(source), "--result_path", str(result), "--max_batch_size", "2")
    )
    found = [json.loads(line) for line in result.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("response", "labels")} for row in found] == rows
    assert found[0]["labels"] == "Paris." and "labels" not in found[1]
    conversations = [
        QUESTION,
        [{"role": "system", "content": "You are a fox."}, {"role": "user", "content": "Hello, fox!"}],
        [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Good day"},
            {"role": "user", "content": "And?"},
        ],
        [{"role": "user", "content": "Hello"}],
    ]
    assert [row["response"] for row in found] == [generator.answer([c])[0] for c in conversations]
    assert list(result.parent.iterdir()) == [result]  # nothing half-written is left


def test_answers_are_judged(
    model_dir: str,
    generator: infer.Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(infer.Generator, "from_arguments", lambda _args: generator)
    said = generator.answer([QUESTION])[0]
    answers = [said, f" {said}\n", "Paris.", None]
    rows = [{"messages": [*QUESTION, *([{"role": "assistant", "content": a}] if a else [])]} for a in answers]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--val_dataset", str(source), "--result_path", str(tmp_path / "out.jsonl")]
    for _ in range(2):  # also of results that were there before
        caplog.clear()
        infer.infer_main(arguments(model_dir, *data, "--metric", "acc"))
        assert "exact_match 0.6667 of 3 rows" in caplog.text
    infer.infer_main(arguments(model_dir, *data, "--metric", "rouge"))
    assert re.search(r"rouge1 0\.\d+, rouge2 0\.\d+, rougeL 0\.\d+ of 3 rows", caplog.text)
    with pytest.raises(UsageError, match="--metric acc: judges answers to --val_dataset"):
        arguments(model_dir, "--prompt", "Hi", "--metric", "acc")


def answered(model_dir: str, monkeypatch: pytest.MonkeyPatch, generator: infer.Generator, file: Path) -> list[Any]:
    monkeypatch.setattr(infer.Generator, "from_arguments", lambda _args: generator)
    result = file.with_suffix(".out")
    infer.infer_main(arguments(model_dir, "--val_dataset", str(file), "--result_path", str(result)))
    return [json.loads(line) for line in result.read_text(encoding="utf-8").splitlines()]


def test_rows_that_cannot_be_answered_cost_only_themselves(
    model_dir: str, generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [
        b'{"query": "Hello"}', b"[1]", b'{"query": ', b'{"query": "smile \\ud83d"}', b'{"query": "caf\xe9"}',
        b'{"query": NaN}', b'{"colour": "red"}', b'{"messages": [{"content": "who says this?"}]}',
        json.dumps({"query": "word " * 3000}).encode(), json.dumps({"query": "a" * 5_000_000}).encode(),
        b'{"messages": [{"role": "user", "content": "Hello"}], "score": NaN}',
    ]  # fmt: skip
    file.write_bytes(b"\n".join(lines))
    done = answered(model_dir, monkeypatch, generator, file)
    hello = generator.answer([[{"role": "user", "content": "Hello"}]])[0]
    assert [row["response"] for row in done] == [hello, *[None] * 9, hello]
    assert all(row["error"].startswith(f"{file}:{i + 1}: ") for i, row in enumerate(done) if i not in (0, 10))
    reasons = ("not an object", "not valid JSON", "surrogate", "not UTF-8", "no known format", "no known format",
               "no role", "tokens", "characters")  # fmt: skip
    assert all(reason in row["error"] for reason, row in zip(reasons, done[1:10], strict=True))
    file.write_bytes(b"\n".join(lines[1:3]))
    file.with_suffix(".out").unlink()  # results of other rows are never overwritten
    with pytest.raises(
        DatasetError, match=r"none of 2 rows could be answered, the first: .*rows.jsonl:1: not an object"
    ):
        answered(model_dir, monkeypatch, generator, file)
    with pytest.raises(UsageError, match="no such file"):
        answered(model_dir, monkeypatch, generator, tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ends.jsonl", json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *QUESTION]})),
        ("array.json", json.dumps([{"messages": [{"role": "system", "content": "Be brief."}, *QUESTION]}])),
        ("bom.jsonl", "\ufeff" + json.dumps({"query": QUESTION[0]["content"], "system": "Be brief."}) + "\r\n"),
        ("table.csv", f"query,system\n{QUESTION[0]['content']},Be brief.\n"),
        ("empty.jsonl", json.dumps({"query": QUESTION[0]["content"], "response": "", "system": "Be brief."})),
    ],
)
def test_one_reader_serves_training_and_inference(
    name: str, content: str, model_dir: str, generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    (row,) = answered(model_dir, monkeypatch, generator, tmp_path / name)
    assert row["response"] == generator.answer([[{"role": "system", "content": "Be brief."}, *QUESTION]])[0]


def test_chat_keeps_the_history(
    generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("Hello\n\nAnd?\nclear\nsystem You are a fox.\nHello\nexit\nnever read\n")
    )
    seen: list[list[dict[str, Any]]] = []
    original = infer.Generator.stream

    def recorded(self: infer.Generator, messages: list[dict[str, Any]]) -> Any:
        seen.append([dict(m) for m in messages])
        return original(self, messages)

    monkeypatch.setattr(infer.Generator, "stream", recorded)
    infer.chat(generator)
    assert [[m["role"] for m in messages] for messages in seen] == [
        ["user"],
        ["user", "assistant", "user"],
        ["system", "user"],
    ]
    first = generator.answer([seen[0]])[0]
    assert seen[1][1]["content"] == first
    assert first in capsys.readouterr().out


def test_adapters_are_added(model_dir: str, generator: infer.Generator, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from swiftlite.llm.model.loader import get_model_tokenizer

    base, _ = get_model_tokenizer(model_dir, model_type="qwen2")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path)
    loaded = infer.Generator.from_arguments(arguments(model_dir, "--adapters", str(tmp_path)))
    ids = torch.tensor([loaded.template.encode_prompt(QUESTION)])
    with torch.no_grad():
        expected = adapted.eval()(ids).logits
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-5)
        assert not torch.allclose(generator.model(ids).logits, expected, atol=1e-2)
    assert loaded._room(10) == 246  # the model's facts are found behind the adapter


# ---- results of an earlier run ----


def test_a_run_that_was_ended_goes_on(
    model_dir: str, generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file, result = tmp_path / "rows.jsonl", tmp_path / "rows.out"
    questions = ["Hello", "What?", "Who?", "Where?"]
    file.write_text("\n".join(json.dumps({"query": text, "response": "known"}) for text in questions))
    whole = answered(model_dir, monkeypatch, generator, file)
    asked: list[str] = []

    def counting(conversations: Any, tools: Any = ()) -> list[str]:
        asked.extend(conversation[-1]["content"] for conversation in conversations)
        if "Where?" in asked and ended:
            raise KeyboardInterrupt
        return answer(conversations, tools)

    ended, answer = True, generator.answer
    monkeypatch.setattr(generator, "answer", counting)
    result.unlink()
    with pytest.raises(KeyboardInterrupt):
        answered(model_dir, monkeypatch, generator, file)
    partial = result.with_name("rows.out.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and not result.exists()
    partial.write_bytes(b"".join(lines[:2]) + lines[2][:-9])  # a kill in the middle of a line
    ended, asked[:] = False, []
    assert answered(model_dir, monkeypatch, generator, file) == whole and asked == ["Who?", "Where?"]
    said = "2 of 4 rows were answered before, by whatever model and settings; 2 are left. To answer all: remove "
    assert f"{said}{partial}\n" in caplog.text
    assert not partial.exists()
    asked.clear()
    file.write_text(file.read_text() + "\n" + json.dumps({"query": "More?"}))
    assert answered(model_dir, monkeypatch, generator, file)[:4] == whole and asked == ["More?"]
    kept = result.read_bytes()
    file.write_text(json.dumps({"query": "Another"}))
    with pytest.raises(UsageError, match=r"holds results of other rows \(line 1\); name another file, or remove it"):
        answered(model_dir, monkeypatch, generator, file)
    file.write_text(json.dumps({"query": "Hello", "response": "known"}))
    with pytest.raises(UsageError, match="holds 5 rows, the data 1"):
        answered(model_dir, monkeypatch, generator, file)
    assert result.read_bytes() == kept


# ---- what a terminal shows ----


@pytest.mark.parametrize("size", [1, 3, 100])
def test_thoughts_are_dim(size: int) -> None:
    text = "a <b <think>\nwhy</th\n</think>\n\nso <think>x"
    shown = "".join(infer.dimmed(text[at : at + size] for at in range(0, len(text), size)))
    assert shown == "a <b \x1b[2m<think>\nwhy</th\n</think>\x1b[0m\n\nso \x1b[2m<think>x\x1b[0m"
    assert "".join(infer.dimmed(["no ", "<thoughts"])) == "no <thoughts"


# ---- vLLM ----


class FakeParams:
    @classmethod
    def from_optional(cls, **settings: Any) -> dict[str, Any]:
        return settings


class FakeLLM:
    """The part of vLLM's interface that is used (vllm/entrypoints/llm.py, 0.33)."""

    default_sampling_params: dict[str, Any] | None = None

    def __init__(self, **loading: Any) -> None:
        self.loading, self.asked = loading, list[Any]()
        made.append(self)

    def get_default_sampling_params(self) -> object:
        self.default_sampling_params = {"temperature": 0.6, "top_k": 20}
        return object()

    def generate(self, prompts: Any, params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.asked += [(prompt["prompt_token_ids"], params, lora_request) for prompt in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f"answer {len(self.asked)}")]) for _ in prompts]


made: list[FakeLLM] = []


def test_vllm_answers_the_same_prompts(
    model_dir: str, generator: infer.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, result = tmp_path / "rows.jsonl", tmp_path / "rows.out"
    file.write_text(json.dumps({"query": QUESTION[0]["content"]}) + "\n" + json.dumps({"query": "word " * 3000}))
    words = ["--infer_backend", "vllm", "--val_dataset", str(file), "--result_path", str(result), "--stop_words", "x",
             "--vllm_tensor_parallel_size", "2", "--vllm_gpu_memory_utilization", "0.8", "--max_model_len",
             "200"]  # fmt: skip
    with pytest.raises(UsageError, match="vllm: is not installed; pip install vllm, or .* `swiftlite deploy"):
        infer.infer_main(arguments(model_dir, *words))
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = tuple  # type: ignore[attr-defined]
    vllm = ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeLLM, FakeParams  # type: ignore[attr-defined]
    modules = {"vllm": vllm, "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": request}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    infer.infer_main(arguments(model_dir, *words))
    (engine,) = made
    assert engine.loading == {
        "model": model_dir, "seed": 42, "dtype": "float32", "tensor_parallel_size": 2, "trust_remote_code": False,
        "max_model_len": 200, "gpu_memory_utilization": 0.8,
    }  # fmt: skip
    ((ids, params, lora),) = engine.asked
    assert ids == generator.template.encode_prompt(QUESTION) and lora is None
    assert params == {"temperature": 0.0, "top_k": 20, "stop": ["x"], "max_tokens": 12,
                      "stop_token_ids": generator.template.stop_token_ids}  # fmt: skip
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert rows[0]["response"] == "answer 1" and "tokens" in rows[1]["error"]
    with pytest.raises(UsageError, match="answers a dataset here"):
        arguments(model_dir, "--infer_backend", "vllm")
