"""`swiftlite preview`: what is shown is what encode gives; dropped rows, histogram, packing, files."""

from __future__ import annotations

import json
import re

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.cli.main import main
from swiftlite.llm.preview import _runs, as_html, as_text, histogram, preview_main, tokens_of
from swiftlite.llm.template import get_template
from swiftlite.utils.errors import DatasetError, UsageError

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}? 🙂"},
            {"role": "assistant", "content": "Paris é. " * (i + 1)},
        ]
    }
    for i in range(8)
]


@pytest.fixture
def words(tiny_model, tmp_path):
    data = tmp_path / "data.jsonl"
    bad = ['{"messages": []}', "{no json", json.dumps({"messages": [ROWS[0]["messages"][0]]})]
    data.write_text("\n".join([*(json.dumps(row) for row in ROWS), *bad]) + "\n")
    return ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--dataset", str(data), "--max_length", "200"]


def test_tokens_cover_the_text(tiny_tokenizer_dir):
    template = get_template("qwen3", PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir))
    encoded = template.encode(ROWS[2])
    text, spans = template.training_text(ROWS[2])
    tokens = tokens_of(template, encoded, text)
    assert [token.id for token in tokens] == encoded["input_ids"]
    assert "".join(token.text for token in tokens) == text and "🙂" in text
    assert [(run, weight) for run, weight in _runs(tokens) if weight] == [(text[a:b], w) for a, b, w in spans]


def test_report(words, capsys, tmp_path):
    preview_main([*words, "--output_dir", str(tmp_path / "out"), "--html", str(tmp_path / "r.html"), "--num_rows", "2"])
    out = capsys.readouterr().out
    assert "row 0: " in out and "row 1: " in out and "row 2: " not in out
    assert "⟦<think>\n\n</think>\n\nParis é. <|im_end|>⟧\n" in out
    assert "8 of 11 rows used" in out
    for reason in ("messages is empty", "not valid JSON", "no assistant message"):
        assert re.search(rf"1    9.1 %  {reason}, first: .*data.jsonl:\d+", out), reason
    assert "training stops above --max_drop_ratio 0.05" in out
    assert re.search(r"packed: \d sequences of 200 tokens, fill rate \d\d.\d%", out)
    assert (tmp_path / "out" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 3
    page = (tmp_path / "r.html").read_text()
    assert page.count("class='w1'") > 10 and "&lt;|im_end|&gt;" in page and "<script" not in page


def test_colours_ids_and_weights(words, capsys):
    preview = preview_main([*words, "--color", "always", "--show_ids", "true", "--num_rows", "1", "--loss_scale",
                            "default+ignore_empty_think"])  # fmt: skip
    out = capsys.readouterr().out
    assert "\033[32mParis é. <|im_end|>\033[0m" in out and "\033[2m<think>\033[0m" in out
    number, tokens = preview.shown[0]
    for i, token in enumerate(tokens):
        assert f"{i:>6} {token.id:>8} {token.weight:>7g}  {token.text!r}" in out
    plain = as_text(preview, color=False, show_ids=False)
    assert "\033" not in plain and "⟦Paris é. <|im_end|>⟧" in plain
    assert as_html(preview).count("<span class='w1' title='id ") == sum(token.weight > 0 for token in tokens)


def test_streamed_preview_and_bad_input(words, capsys, tmp_path):
    assert main(["preview", *words, "--streaming", "true", "--num_rows", "0"]) == 0
    assert "8 of 11 rows used" in capsys.readouterr().out
    assert main(["preview", "--model", words[1]]) == 2
    assert "give the data with --dataset" in capsys.readouterr().err
    empty = tmp_path / "bad.jsonl"
    empty.write_text("{}\n")
    assert main(["preview", *words[:5], str(empty)]) == 1
    assert "no row is left" in capsys.readouterr().err


def test_histogram_counts_all():
    lines = histogram([1, 1, 2, 50, 99, 100], width=60)
    assert sum(int(line.split()[1]) for line in lines[:-1]) == 6
    assert lines[-1] == "shortest 1, median 50, 95 % up to 99, longest 100"
    assert histogram([5])[0].split()[:2] == ["5", "1"]


def test_groups(words, capsys, tmp_path):
    """Each text of a group as the model reads it; rows that this loss cannot use are counted."""
    data = tmp_path / "groups.jsonl"
    rows = [{"query": "q one", "pos": "it is", "neg": ["no", "never"]}, {"query": "q two", "pos": "so", "label": 0}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words[words.index("--dataset") + 1] = str(data)
    shown = preview_main([*words, "--task_type", "embedding"])
    out = capsys.readouterr().out
    assert "plain text, max length 200" in out and "1 groups of 3 texts" not in out
    assert ["".join(token.text for token in tokens) for _, tokens in shown.shown] == ["q one", "it is", "no", "never"]
    assert "1 of 2 rows used" in out and "a label that is not 1" in out
    preview_main([*words, "--task_type", "reranker"])
    out = capsys.readouterr().out
    assert "2 groups of 4 texts" in out and "<|im_start|>user\nq one<|im_end|>\n<|im_start|>assistant\n" in out
    preview_main([*words, "--task_type", "generative_reranker", "--max_length", "300"])
    assert "<Query>: q two\n<Document>: so<|im_end|>" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--task_type embedding has infonce"):
        preview_main([*words, "--task_type", "embedding", "--loss_type", "listwise_reranker"])
    data.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DatasetError):
        preview_main([*words, "--task_type", "embedding"])
