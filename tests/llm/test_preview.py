"""`swiftlite preview`: what is shown is what encode gives; dropped rows, histogram, packing, files."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.cli.main import main
from swiftlite.llm.preview import Preview, _runs, as_html, as_text, histogram, preview_main
from swiftlite.llm.preview_rows import Shown, Token, tokens_of
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
    assert re.search(r"packed sequences of 200 tokens: \d, fill rate \d\d.\d%", out)
    assert (tmp_path / "out" / "lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 3
    page = (tmp_path / "r.html").read_text()
    assert page.count("class='w1'") > 10 and "&lt;|im_end|&gt;" in page and "<script" not in page


def test_the_page_in_a_browser(tmp_path, page):
    """Texts of the data stay text, wherever they stand, and fit a phone."""
    asked = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"
    said = "<h1 onclick='alert(3)'>&amp; 巴黎 🙂</h1>\n\n" + 99 * "long"
    shown = Shown("0", [Token(1, asked, 0.0), Token(2, said, 1.0), Token(3, "</span>", 2.0)], asked)
    (tmp_path / "r.html").write_text(as_html(Preview(asked, [asked], [asked], [asked], [shown], [3], [asked])))
    address = page.open(tmp_path / "r.html", width=390)
    assert page.value("document.querySelector('pre').textContent") == f"{asked}{said}</span>"
    assert page.value("document.querySelector('.w1[title]').textContent") == said
    assert page.value("document.body.textContent").count(asked) == 7
    assert page.value("document.title") == f"preview of {asked}"
    assert page.value("document.querySelectorAll('script, img, pre h1').length") == 0
    assert page.value("document.documentElement.scrollWidth") == 390
    assert page.errors == [] and page.requests == [address]


def test_colours_ids_and_weights(words, capsys):
    preview = preview_main([*words, "--color", "always", "--show_ids", "true", "--num_rows", "1", "--loss_scale",
                            "default+ignore_empty_think"])  # fmt: skip
    out = capsys.readouterr().out
    assert "\033[32mParis é. <|im_end|>\033[0m" in out and "\033[2m<think>\033[0m" in out
    tokens = preview.shown[0].tokens
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


def _preview(tmp_path, capsys, model, rows, *flags):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = ["--max_length", "200", "--html", str(tmp_path / "r.html"), "--max_drop_ratio", "1", *flags]
    preview_main(["--model", str(model), "--model_type", "qwen3", "--dataset", str(data), *shown])
    return capsys.readouterr().out


@pytest.fixture
def named(tiny_model, tmp_path):
    """A classifier's directory, whose config has names for three classes."""
    directory = tmp_path / "classifier"
    shutil.copytree(tiny_model("qwen3"), directory)
    config = json.loads((directory / "config.json").read_text())
    names = {"2": "product", "0": "delivery", "1": "payment"}
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": names}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "labels, flags, told, counted",
    [
        ([2, 0, 2], ["--num_labels", "3"], ["2", "0", "2"], "rows of each class: 0: 1, 1: 0, 2: 2"),
        (
            [[0, 2], [], [1]],
            ["--num_labels", "3"],
            ["0, 2", "no class", "1"],
            "rows of each class: 0: 1, 1: 1, 2: 1",
        ),
        ([0.5, -2, 3], ["--num_labels", "1"], ["0.5", "-2", "3"], "labels from -2 to 3, mean 0.5"),
        ([[0.5, 1.0]] * 2, ["--num_labels", "2"], ["0.5, 1"] * 2, "labels from 0.5 to 1, mean 0.75"),
    ],
)
def test_labels_are_shown(tiny_model, tmp_path, capsys, labels, flags, told, counted):
    rows = [{"text": f"Where is {i}?", "label": label} for i, label in enumerate(labels)]
    rows.append({"text": "Which?", "label": 9 if flags[1] == "3" else "much"})
    out = _preview(tmp_path, capsys, tiny_model("qwen3"), rows, "--task_type", "seq_cls", *flags)
    heads = re.findall(r"^row \d: \d+ tokens, (.*)$", out, re.M)
    assert heads == [f"label {text}" for text in told]
    assert counted in out.splitlines() and "with a loss" not in out
    assert "Where is 0?" in out and "⟦Where" not in out
    page = (tmp_path / "r.html").read_text()
    assert all(f"tokens, {head}</h2>" in page for head in heads)
    assert f"{len(labels)} of {len(rows)} rows used" in out and re.search("label (out of range|of a wrong kind)", out)


def test_classes_are_shown_by_the_names_of_the_model(named, tmp_path, capsys):
    rows = [{"text": f"Where is {i}?", "label": label} for i, label in enumerate([1, 2])]
    out = _preview(tmp_path, capsys, named, rows, "--task_type", "seq_cls")
    assert re.findall(r"tokens, (.*)$", out, re.M)[-2:] == ["label 1 (payment)", "label 2 (product)"]
    assert "rows of each class: 0 (delivery): 0, 1 (payment): 1, 2 (product): 1" in out


def test_pairs_are_shown_with_their_margins(tiny_model, tmp_path, capsys):
    rows = [{**row, "rejected_response": f"No, {i}."} for i, row in enumerate(ROWS[:3])]
    rows[1]["margin"], rows[2]["margin"] = 2, 0.25
    rows += [ROWS[3], {**rows[0], "margin": "much"}]
    out = _preview(tmp_path, capsys, tiny_model("qwen3"), rows, "--rlhf_type", "rm")
    heads = re.findall(r"^row (.*): \d+ tokens, (.*)$", out, re.M)
    told = {0: "no margin", 1: "margin 2", 2: "margin 0.25"}
    assert heads == [(f"{i}, {side}", told[i]) for i in range(3) for side in ("chosen", "rejected")]
    assert "2 of 3 pairs have a margin, from 0.25 to 2" in out and "3 pairs, " in out
    assert "No, 1.<|im_end|>" in out and "⟦No" not in out
    assert "no rejected answer" in out and "margin is not a number" in out
    out = _preview(tmp_path, capsys, tiny_model("qwen3"), rows, "--rlhf_type", "dpo")
    assert out.count("No, 1.<|im_end|>⟧") == 1 and "have a margin" not in out
    assert main(["preview", "--model", "DIR", "--dataset", "F", "--task_type", "seq_cls", "--rlhf_type", "rm"]) == 2


def test_histogram_counts_all():
    lines = histogram([1, 1, 2, 50, 99, 100], width=60)
    assert sum(int(line.split()[1]) for line in lines[:-1]) == 6
    assert lines[-1] == "shortest 1, median 50, 95 % up to 99, longest 100"
    assert histogram([5])[0].split()[:2] == ["5", "1"]


def test_groups(words, capsys, tmp_path):
    """Each text of a group as the model reads it; rows that this loss cannot use are counted."""
    data = tmp_path / "groups.jsonl"
    rows = [
        {"query": "q one", "pos": "it is", "neg": ["no", "jamais été"]},
        {"query": "q two", "pos": "so", "label": 0},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words[words.index("--dataset") + 1] = str(data)
    shown = preview_main([*words, "--task_type", "embedding"])
    out = capsys.readouterr().out
    assert "plain text, max length 200" in out and "1 groups of 4 texts" in out
    assert ["".join(token.text for token in each.tokens) for each in shown.shown] == [
        "q one",
        "it is",
        "no",
        "jamais été",
    ]
    assert "trained on" not in out and "trained on" not in as_html(shown)
    assert "1 of 2 rows used" in out and "a label that is not 1" in out
    preview_main([*words, "--task_type", "reranker"])
    out = capsys.readouterr().out
    assert "2 groups of 4 texts" in out and re.findall(r"tokens, (.*)$", out, re.M) == [
        "relevant 1", "relevant 0", "relevant 0", "relevant 0",
    ]  # fmt: skip
    assert "<|im_start|>user\nq one<|im_end|>\n<|im_start|>assistant\n" in out
    preview_main([*words, "--task_type", "generative_reranker", "--max_length", "300"])
    assert "<Query>: q two\n<Document>: so<|im_end|>" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--task_type embedding has infonce"):
        preview_main([*words, "--task_type", "embedding", "--loss_type", "listwise_reranker"])
    data.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DatasetError):
        preview_main([*words, "--task_type", "embedding"])
