"""`swiftlite eval`: numbers are those of a plain loop with transformers, scores those of other libraries."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from swiftlite.arguments.evaluate import EvalArguments
from swiftlite.arguments.parser import parse
from swiftlite.checkpoint.preflight import check_command
from swiftlite.cli import evaluate
from swiftlite.cli.prepared import Readable
from swiftlite.llm.scores import chosen, scores
from swiftlite.utils.errors import SwiftliteError, UsageError
from tests.serving import HELLO, SAID

ROWS = {
    "known.jsonl": [("Hello!", SAID), ("Is it raining in Paris?", "I do not know.")],
    "other.jsonl": [("What is the capital of France?", "Paris."), ("Who is quick?", "The brown fox."), ("And?", "No.")],
}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, rows in ROWS.items():
        lines = [json.dumps({"query": query, "response": answer}) for query, answer in rows]
        (tmp_path / name).write_text("\n".join(lines))
    return [str(tmp_path / name) for name in ROWS]


def run(*words: str) -> list[dict[str, Any]]:
    args = parse(EvalArguments, list(words))
    check_command(args)
    return list(evaluate.eval_main(args)["models"])


def answer_log_probs(model: Any, tokenizer: Any, query: str, answer: str) -> torch.Tensor:
    """Of the answer's tokens and its end token, one forward pass a row."""
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], add_generation_prompt=True, return_dict=False
    )
    said = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([asked + said])
    with torch.no_grad():
        found = log_softmax(model(ids).logits[0, :-1].double(), -1)
    return found.gather(1, ids[0, 1:, None])[len(asked) - 1 :, 0]


def load(model: Path, adapter: Path | None = None) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if adapter is None:
        return loaded.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, str(adapter)).eval()


def test_losses_of_models_side_by_side(
    chat_model: Path, adapter: Path, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "made" / "result.json"
    found = run("--model", str(chat_model), str(adapter), "--val_dataset", *files, "--max_batch_size", "2",
                "--result_path", str(result))  # fmt: skip
    assert [entry["model"] for entry in found] == [str(chat_model), str(adapter)]
    assert json.loads(result.read_text()) == {"models": found}
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    for entry, model in zip(found, (load(chat_model), load(chat_model, adapter)), strict=True):
        parts = {}
        for file in files:
            rows = ROWS[Path(file).name]
            parts[file] = torch.cat([answer_log_probs(model, tokenizer, query, answer) for query, answer in rows])
        parts["all"] = torch.cat(list(parts.values()))
        assert set(entry["results"]) == set(parts)
        for name, part in parts.items():
            loss = -part.mean().item()
            assert entry["results"][name] == pytest.approx({"loss": loss, "perplexity": math.exp(loss)}, rel=1e-4)
    assert found[0]["results"]["all"]["loss"] != pytest.approx(found[1]["results"]["all"]["loss"], rel=0.01)
    shown = capsys.readouterr().out
    assert "perplexity" in shown and f"{found[1]['results']['all']['loss']:.6g}" in shown


def test_loss_of_pairs_against_the_base(chat_model: Path, adapter: Path, tmp_path: Path) -> None:
    rows = [("Hello!", SAID, "Go away."), ("Who?", "The fox.", "The lazy dog.")]
    file = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"query": q, "response": good, "rejected_response": bad}) for q, good, bad in rows]
    file.write_text("\n".join(lines))
    words = ["--val_dataset", str(file), "--objective", "dpo", "--beta", "0.3"]
    (values,) = run("--model", str(adapter), *words)[0]["results"].values()
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    policy, base = load(chat_model, adapter), load(chat_model)
    margins = [
        sum(sign * (answer_log_probs(policy, tokenizer, q, text).sum() - answer_log_probs(base, tokenizer, q, text).sum())
            for sign, text in ((1, good), (-1, bad)))
        for q, good, bad in rows
    ]  # fmt: skip
    expected = -logsigmoid(0.3 * torch.stack(margins)).mean().item()  # type: ignore[arg-type]
    assert values["loss"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UsageError, match="compares with a reference; give --ref_model"):
        run("--model", str(chat_model), *words)


def test_plain_text(chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    texts = ["The quick brown fox jumps.", "Weights are read from the file."]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (values,) = run("--model", str(chat_model), "--val_dataset", str(file), "--objective", "pt")[0]["results"].values()
    tokenizer, model = AutoTokenizer.from_pretrained(chat_model), load(chat_model)
    losses = []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses += (-log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])).flatten().tolist()
    assert values["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_answers_are_judged(chat_model: Path, files: list[str]) -> None:
    (entry,) = run("--model", str(chat_model), "--val_dataset", files[0], "--metrics", "exact_match", "rouge",
                   "--max_new_tokens", "20", "--max_batch_size", "2")  # fmt: skip
    values = entry["results"][files[0]]
    assert values["rows"] == 2 and values["exact_match"] == 0.5  # it knows one of the two
    assert 0.5 <= values["rouge1"] < 1


def test_scores() -> None:
    english = [("The quick brown fox, jumps!", "the fox jumps over it"), ("<think>no</think>\n\nYes", "yes")]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    wanted = [scorer.score(reference, answer.rpartition("</think>")[2]) for answer, reference in english]
    found = scores("rouge", english)
    assert found == pytest.approx({n: sum(w[n].fmeasure for w in wanted) / 2 for n in ("rouge1", "rouge2", "rougeL")})
    assert scores("rouge", [("我喜欢猫", "我喜欢狗")])["rouge1"] == 0.75  # rouge-score's own words leave nothing of it
    assert scores("exact_match", [(" a  b\n", "a b"), ("Ａ", "A"), ("a", "b")])["exact_match"] == pytest.approx(2 / 3)
    texts = {"B": "B", "(c) no, the answer is D.": "D", "A dog is no answer": None, "答案：**C**": "C", "B. Paris": "B",
             "I choose (A).": "A", "nothing": None, "So the correct answer: b": "B"}  # fmt: skip
    assert {text: chosen(text) for text in texts} == texts
    pairs = [("The answer is B", "B"), ("none", "A"), ("C", "no letter here")]
    assert scores("choice", pairs) == {"choice_accuracy": 0.5, "choice_rows": 2.0}


LM_EVAL = [
    (["--max_batch_size", "8", "--torch_dtype", "bf16"], Readable("DIR"),
     "lm_eval --model hf --model_args pretrained=DIR,dtype=bfloat16 --tasks gsm8k,mmlu --batch_size 8 "
     "--apply_chat_template --output_path OUT"),
    (["--num_fewshot", "5", "--limit", "100", "--use_chat_template", "false", "--", "--device", "cpu"],
     Readable("DIR", Path("/a")),
     "lm_eval --model hf --model_args pretrained=DIR,peft=/a --tasks gsm8k,mmlu --batch_size 1 --num_fewshot 5 --limit 100 "
     "--output_path OUT --device cpu"),
    (["--infer_backend", "vllm", "--tensor_parallel_size", "2", "--max_model_len", "4096"], Readable("DIR", Path("/a")),
     "lm_eval --model vllm --model_args pretrained=DIR,tensor_parallel_size=2,max_model_len=4096,lora_local_path=/a "
     "--tasks gsm8k,mmlu --batch_size 1 --apply_chat_template --output_path OUT"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "read", "expected"), LM_EVAL)
def test_words_of_lm_eval(words: list[str], read: Readable, expected: str) -> None:
    args = parse(EvalArguments, ["--model", "M", "--eval_backend", "lm_eval", "--tasks", "gsm8k", "mmlu", *words])
    assert evaluate.lm_eval_words(args, read, Path("OUT")) == expected.split()


def test_benchmarks_run_in_a_child(
    chat_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval writes a folder for the model and a file with the date in its name; here a program that does the same."""
    program = tmp_path / "lm_eval"
    program.write_text(f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
if "--fail" in words:
    sys.exit(3)
folder = pathlib.Path(words[words.index("--output_path") + 1]) / "model"
folder.mkdir(parents=True)
values = {{"alias": "gsm8k", "acc,none": 0.5, "acc_stderr,none": "N/A", "peft": float("peft" in words[3])}}
(folder / "results_2026-01-01.json").write_text(json.dumps({{"results": {{"gsm8k": values}}}}))
""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--eval_backend", "lm_eval", "--eval_dataset", "gsm8k"]
    found = run("--model", str(chat_model), str(adapter), *words)
    assert [entry["results"] for entry in found] == [{"gsm8k": {"acc": 0.5, "peft": peft}} for peft in (0.0, 1.0)]
    with pytest.raises(SwiftliteError, match="lm_eval ended with 3"):
        run("--model", str(chat_model), *words, "--", "--fail")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"lm-evaluation-harness is not installed; pip install 'lm-eval\[hf\]'"):
        run("--model", str(chat_model), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one or more models"),
        (["--model", "A"], "give the data with --val_dataset"),
        (["--model", "A", "--adapters", "B"], "an adapter is a model of its own here"),
        (["--model", "A", "--eval_backend", "lm_eval"], "name benchmarks with --tasks"),
        (["--model", "A", "--eval_backend", "OpenCompass"], "benchmarks are run by lm-evaluation-harness here"),
        (["--model", "A", "--val_dataset", "f", "--tasks", "x"], "goes with --eval_backend lm_eval"),
        (["--model", "A", "--val_dataset", "f", "--objective", "pt", "--metrics", "rouge"], "judges answers"),
    ],
)
def test_what_does_not_fit_together(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(EvalArguments, words)


def test_a_question_alone_has_no_score(chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"messages": HELLO}) + "\n" + json.dumps({"query": "Hello!", "response": SAID}))
    (values,) = run("--model", str(chat_model), "--val_dataset", str(file), "--metrics", "exact_match",
                    "--max_new_tokens", "20")[0]["results"].values()  # fmt: skip
    assert values == {"rows": 1.0, "exact_match": 1.0}


def test_a_score_of_no_rows_is_left_out(chat_model: Path, files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    (entry,) = run("--model", str(chat_model), "--val_dataset", files[0], "--metrics", "choice", "--max_new_tokens", "2",
                   "--result_path", str(path))  # fmt: skip
    assert entry["results"][files[0]] == {"rows": 2.0, "choice_rows": 0.0}  # no answer is a letter
    assert "NaN" not in path.read_text()


def test_what_is_missing_is_told_first(
    chat_model: Path, files: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def not_yet(*_: Any) -> None:
        raise AssertionError("a model was evaluated")

    monkeypatch.setattr("swiftlite.llm.evaluate.trained_losses", not_yet)
    with pytest.raises(UsageError, match="--model nowhere: no such directory"):
        run("--model", str(chat_model), "nowhere", "--val_dataset", files[0])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UsageError, match="--metrics rouge: is computed by rouge-score"):
        run("--model", str(chat_model), "--val_dataset", files[0], "--metrics", "loss", "rouge")
