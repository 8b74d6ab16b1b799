"""Tokenised data on disk: equal to what encoding gives, found by content, refused where settings differ."""

from __future__ import annotations

import json
import re

import pytest
from transformers import PreTrainedTokenizerFast

from swiftlite.cli.main import main
from swiftlite.families.templates import get_template_meta
from swiftlite.llm.dataset import EncodedDataset, PackedDataset, load_dataset
from swiftlite.llm.dataset.cache import encode_cached, fingerprint, load_cached_dataset
from swiftlite.llm.dataset.report import RejectsFile
from swiftlite.llm.dataset.store import TokenStore
from swiftlite.llm.template import get_template
from swiftlite.llm.template.base import Template
from swiftlite.utils.errors import DatasetError

ROWS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "answer " * (i % 9 + 1)}]}
    for i in range(700)
]


@pytest.fixture
def make_template(tiny_tokenizer_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    return lambda name="chatml", **kwargs: get_template(name, tokenizer, **kwargs)


def test_saved_and_mapped_samples_are_equal(make_template, tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[3] = {"messages": [ROWS[3]["messages"][0], {**ROWS[3]["messages"][1], "loss_scale": 0.25}], "label": True}
    dataset = EncodedDataset(rows, make_template(remove_unused_columns=False))
    dataset.store.save(tmp_path / "d")
    loaded = EncodedDataset.of(TokenStore.load(tmp_path / "d"))
    assert list(loaded) == list(dataset)
    assert loaded[3]["label"] is True and set(loaded[3]["loss_scale"]) == {0.0, 0.25}
    assert loaded[-1] == dataset[699] and loaded.lengths == dataset.lengths
    (tmp_path / "d" / "labels.bin").write_bytes(b"\0" * 40)
    with pytest.raises(DatasetError, match="labels.bin is cut off"):
        EncodedDataset.of(TokenStore.load(tmp_path / "d"))


def test_processes_give_the_same(make_template):
    rows = ROWS + [{"messages": [{"role": "user", "content": None}, ROWS[0]["messages"][1]]}]
    one, two = (EncodedDataset(rows, make_template(max_length=60), max_drop_ratio=0.5, num_proc=n) for n in (1, 2))
    assert list(one) == list(two) and len(one) < 700
    assert one.report.summary() == two.report.summary() and one.row_indices == two.row_indices


def test_cache_finds_rows_by_content(make_template, tmp_path, monkeypatch):
    monkeypatch.setenv("SWIFTLITE_CACHE", str(tmp_path / "cache"))
    made = []
    real = EncodedDataset.__init__

    def counted(self, *args, **kwargs):
        made.append(1)
        real(self, *args, **kwargs)

    monkeypatch.setattr(EncodedDataset, "__init__", counted)
    rows = [*ROWS, {"messages": [{"role": "user", "content": "no answer"}]}]

    def get(rows=rows, **kwargs):
        rejects = RejectsFile(tmp_path / "rejects.jsonl")
        settings = {"max_drop_ratio": 0.05, "name": "d", "num_proc": 1, "rejects": rejects}
        return encode_cached(rows, make_template(**kwargs), **settings)

    first = get()
    written = (tmp_path / "rejects.jsonl").read_text()
    second = get()
    assert len(made) == 1
    assert list(second) == list(first) and second.row_indices == first.row_indices
    assert second.report.summary() == first.report.summary()
    assert (tmp_path / "rejects.jsonl").read_text() == written and "no answer" in written
    get([*rows[:-1]])
    get(loss_scale="last_round")
    get(max_length=90)
    assert len(made) == 4, "other rows or settings are encoded anew"
    get(), get(max_length=90)
    assert len(made) == 4
    with pytest.raises(DatasetError, match="1 of 701 rows dropped"):
        encode_cached(rows, make_template(), max_drop_ratio=0.0, name="d", num_proc=1, rejects=None)


def test_fingerprint_names_what_matters(make_template):
    base = fingerprint(make_template())
    assert base == fingerprint(make_template(padding_side="left"))
    for settings in ({"default_system": "S"}, {"loss_scale": "default+hermes"}, {"truncation_strategy": "left"}):
        other = fingerprint(make_template(**settings))
        assert [name for name in base if base[name] != other[name]], settings
    assert base["template"] != fingerprint(make_template("qwen3"))["template"]


# ---- export --to_cached_dataset ----


@pytest.fixture
def cached(tiny_model, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[:120], {"messages": []}]))
    model = tiny_model("qwen3")

    def export(name, *flags, data=data):
        words = ["export", "--to_cached_dataset", "true", "--model", str(model), "--model_type", "qwen3", "--dataset",
                 str(data), "--output_dir", str(tmp_path / name), "--max_length", "100", *flags]  # fmt: skip
        code = main(words)
        return code, tmp_path / name, capsys.readouterr().err

    return export


def test_export_and_read_back(cached, tmp_path, tiny_model):
    code, directory, err = cached("c", "--split_dataset_ratio", "0.1", "--packing", "true", "--packing_length", "200")
    assert code == 0, err
    facts = json.loads((directory / "cached_dataset.json").read_text())
    assert (facts["train"]["samples"], facts["val"]["samples"], facts["packing_length"]) == (108, 12, 200)
    assert "messages is empty" in (directory / "rejects.jsonl").read_text()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_model("qwen3"))
    template = get_template("qwen3", tokenizer, max_length=100)
    parts = {part: load_cached_dataset([str(directory)], template, 200, [part]) for part in ("train", "val")}
    train_rows, val_rows = load_dataset(str(tmp_path / "data.jsonl"), split_dataset_ratio=0.1)
    wanted = PackedDataset(EncodedDataset(train_rows, template), 200, seed=42)
    assert list(parts["train"]) == list(wanted) and parts["train"].sequences == wanted.sequences
    assert list(parts["val"].dataset) == list(EncodedDataset(val_rows, template))
    with pytest.raises(DatasetError, match="was written with max_length 100, this run has 50"):
        load_cached_dataset([str(directory)], get_template("qwen3", tokenizer, max_length=50), 200)
    with pytest.raises(DatasetError, match="is packed to 200 tokens, this run does not pack"):
        load_cached_dataset([str(directory)], template, None)
    with pytest.raises(DatasetError, match="has no cached_dataset.json"):
        load_cached_dataset([str(tmp_path)], template, None)
    # Several directories, packed or not, are one dataset; DIR/val names a part.
    _, plain, _ = cached("c2", "--split_dataset_ratio", "0.2")
    both = load_cached_dataset([str(directory), str(plain), f"{directory}/val"], template, 200)
    others = EncodedDataset(load_dataset(str(tmp_path / "data.jsonl"), split_dataset_ratio=0.2)[0], template)
    whole = [*wanted.dataset, *others, *parts["val"].dataset]
    assert list(both.dataset) == whole
    assert sorted(i for sequence in both.sequences for i in sequence) == list(range(len(whole)))
    assert both.lengths[-1] == sum(len(whole[i]["input_ids"]) for i in both.sequences[-1])
    turned = load_cached_dataset([str(plain), str(directory), f"{directory}/val"], template, 200)
    assert turned.content_hash() != both.content_hash()
    with pytest.raises(DatasetError, match="has no part val"):
        load_cached_dataset([f"{cached('c3')[1]}/val"], template, None)


def test_export_refuses(cached, tmp_path):
    code, directory, err = cached("d")
    assert code == 0
    code, _, err = cached("d")
    assert code == 2 and "exists already" in err
    code, _, err = cached("e", "--to_mcore", "true")
    assert code == 2 and "converts no model" in err
    code, other, err = cached("f", "--max_drop_ratio", "0")
    assert code == 1 and "1 of 121 rows dropped" in err and not other.exists()
    assert not list(tmp_path.glob(".f.tmp*"))


def test_both_trainers_read_it(cached, tiny_model, tmp_path):
    """The same losses from the cache as from the rows, on both sides."""
    pytest.importorskip("megatron.core")
    code, directory, err = cached("g", "--packing", "true")
    assert code == 0, err
    model = str(tiny_model("qwen3"))
    common = ["--model", model, "--model_type", "qwen3", "--max_length", "100", "--packing", "true", "--train_iters", "3",
              "--global_batch_size", "2", "--micro_batch_size", "1", "--torch_dtype", "float32", "--lr", "1e-3",
              "--logging_steps", "1", "--save_weights_only", "true"]  # fmt: skip
    data = {"rows": ["--dataset", str(tmp_path / "data.jsonl")], "cache": ["--cached_dataset", str(directory)]}

    def losses(*command):
        where = tmp_path / "-".join(command)
        words = [*command[:-1], *common, *data[command[-1]], "--output_dir", str(where)]
        assert main(words) == 0
        lines = [json.loads(line) for line in (where / "logging.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    megatron = losses("megatron", "sft", "rows")
    assert losses("megatron", "sft", "cache") == megatron and len(megatron) == 3
    hugging_face = losses("sft", "cache")
    assert hugging_face == losses("sft", "rows") == pytest.approx(megatron, rel=1e-5)


def test_pairs_are_written_and_read(cached, tiny_model, tmp_path):
    """`--template_mode rlhf`: training on two directories of pairs is training on the rows of both."""
    code, _, err = cached("h", "--template_mode", "rlhf", "--packing", "true")
    assert code == 2 and "pairs are packed where they are trained on" in err
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    for name in "ab":
        lines = [json.dumps({**row, "rejected_response": f"{name} {i}"}) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        code, _, err = cached(f"pairs-{name}", "--template_mode", "rlhf", data=tmp_path / f"{name}.jsonl")
        assert code == 0, err
    code, samples, _ = cached("i")
    given = {
        "rows": ["--dataset", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")],
        "cache": ["--cached_dataset", str(tmp_path / "pairs-a"), str(tmp_path / "pairs-b/train")],
    }
    losses = {}
    for name, data in given.items():
        words = ["dpo", "--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--max_length", "100", *data,
                 "--train_iters", "3", "--global_batch_size", "4", "--lr", "1e-3", "--logging_steps", "1",
                 "--torch_dtype", "float32", "--output_dir", str(tmp_path / name)]  # fmt: skip
        assert main(words) == 0
        lines = (tmp_path / name / "logging.jsonl").read_text().splitlines()
        losses[name] = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses["cache"] == losses["rows"] and len(set(losses["rows"])) == 3
    words[words.index("--cached_dataset") + 1] = str(samples)
    assert main([*words[:-1], str(tmp_path / "j")]) == 1


def test_classifiers_and_reward_models_read_it(cached, tiny_model, tmp_path, capsys):
    """The same losses from the cache as from the rows, on both sides; labels of another kind are refused."""
    pytest.importorskip("megatron.core")
    texts = [f"{'good' if i % 3 else 'bad'} film {i} " * (i % 4 + 1) for i in range(8)]
    (tmp_path / "films.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": [i % 3] * (i % 2)}) for i, text in enumerate(texts))
    )
    several = ["--task_type", "seq_cls", "--num_labels", "3"]
    code, films, err = cached("films", *several, data=tmp_path / "films.jsonl")
    assert code == 0, err
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    for name in "ab":  # half of the pairs have a margin
        lines = [{**row, "rejected_response": f"{name} {i}", **({"margin": i} if i % 2 else {})} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        code, _, err = cached(f"pairs-{name}", "--template_mode", "rlhf", data=tmp_path / f"{name}.jsonl")
        assert code == 0, err
    common = ["--model", str(tiny_model("qwen3")), "--model_type", "qwen3", "--max_length", "100", "--train_iters", "2",
              "--global_batch_size", "4", "--micro_batch_size", "2", "--torch_dtype", "float32", "--lr", "1e-3",
              "--logging_steps", "1", "--save_weights_only", "true", "--report_to", "none"]  # fmt: skip
    rows = ["--dataset", *(str(tmp_path / f"{name}.jsonl") for name in "ab")]
    pairs = ["--cached_dataset", *(str(tmp_path / f"pairs-{name}") for name in "ab")]
    ways = {
        "films": (["sft"], several, ["--dataset", str(tmp_path / "films.jsonl")], ["--cached_dataset", str(films)]),
        "pairs": (["rlhf"], ["--rlhf_type", "rm"], rows, pairs),
    }
    for name, (command, flags, *sources) in ways.items():
        found = []
        for number, (side, source) in enumerate([((), sources[0]), ((), sources[1]), (("megatron",), sources[1])]):
            where = tmp_path / f"{name}-{number}"
            assert main([*side, *command, *common, *flags, *source, "--output_dir", str(where)]) == 0
            lines = map(json.loads, (where / "logging.jsonl").read_text().splitlines())
            found.append([line["loss"] for line in lines])
        assert found[1] == found[0] == pytest.approx(found[2], rel=1e-5) and len(found[0]) == 2, name
    capsys.readouterr()
    other, plain = tmp_path / "other", cached("plain", data=tmp_path / "a.jsonl")[1]
    wrong = [
        (several[:2], "give the number of classes with --num_labels"),
        ([*several[:3], "4"], "with --num_labels 3 --problem_type multi_label_.*, this run is with --num_labels 4"),
        ([*several, "--problem_type", "regression"], "this run is with --num_labels 3 --problem_type regression"),
        ([], "pooled true, this run has false"),
    ]
    for flags, said in wrong:
        assert main(["sft", *common, *flags, "--cached_dataset", str(films), "--output_dir", str(other)]) != 0
        assert re.search(said, capsys.readouterr().err)
    assert main(["sft", *common, *several, "--cached_dataset", str(plain), "--output_dir", str(other)]) == 1
    assert "pooled false, this run has true" in capsys.readouterr().err and not other.exists()


def test_fingerprint_holds_everything_that_decides_ids_and_labels(tiny_tokenizer_dir):
    def facts(template_type="chatml", chat_template=None, eos="<|im_end|>", tokens=(), **settings):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
        tokenizer.eos_token = eos
        tokenizer.chat_template = chat_template
        tokenizer.add_tokens(list(tokens))
        return fingerprint(get_template(template_type, tokenizer, **settings))

    base, jinja = facts(), facts("jinja", "{{ messages }}")
    for changed in ({"eos": "<|endoftext|>"}, {"tokens": ["<new>"]}, {"enable_thinking": False},
                    {"use_chat_template": False}, {"max_length": 7}, {"remove_unused_columns": False}):  # fmt: skip
        assert facts(**changed) != base, changed
    assert facts("jinja", "{{ messages[0] }}") != jinja
    assert "date" in facts("jinja", "{{ strftime_now('%d') }}") and "date" not in jinja

    class Own(Template):
        """A class of a plug-in, which may encode as it likes."""

    assert fingerprint(Own(get_template_meta("chatml"), make(tiny_tokenizer_dir)))["code"] != base["code"]


def make(directory):
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json", "null", "facts"])
def test_a_damaged_cache_is_made_anew_and_said(make_template, tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setenv("SWIFTLITE_CACHE", str(tmp_path / "cache"))
    rows = [*ROWS[:40], {"messages": [{"role": "user", "content": "no answer"}]}]

    def get():
        return encode_cached(rows, make_template(), max_drop_ratio=0.05, name="d", num_proc=1, rejects=None)

    first = get()
    (directory,) = [path for path in (tmp_path / "cache" / "datasets").iterdir() if path.is_dir()]
    ids = directory / "input_ids.bin"
    content = ids.read_bytes()
    if damage == "flip":
        ids.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    elif damage == "cut":
        ids.write_bytes(content[:-4])
    elif damage == "gone":
        ids.unlink()
    else:
        name, text = {"json": ("dropped.json", "{"), "null": ("store.json", "null"), "facts": ("dropped.json", "{}")}[
            damage
        ]
        (directory / name).write_text(text)
    assert list(get()) == list(first)
    assert "the cache is damaged, so the data is tokenised anew" in caplog.text
    caplog.clear()
    assert list(get()) == list(first) and "tokenised anew" not in caplog.text
    assert get().report.summary() == first.report.summary()


def test_a_cache_that_cannot_be_written_costs_time_only(make_template, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWIFTLITE_CACHE", str(tmp_path / "file"))
    assert len(encode_cached(ROWS[:5], make_template(), max_drop_ratio=0, name="d", num_proc=1, rejects=None)) == 5
    assert "cannot be used as a cache" in caplog.text
