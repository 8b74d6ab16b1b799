"""Model directories that somebody damaged or made on purpose: every mistake is one line with the file's name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.cli.main import main
from swiftlite.utils.io import MAX_JSON_BYTES
from swiftlite.weights.safetensors import INDEX

DEEP = "[" * 100_000
DAMAGES = {
    "cut short": '{"a": ', "no object": "[1]", "nested": DEEP, "no text": b"\xff\xfe\x00", "text": '"a"', "empty": "",
    "long number": '{"a": ' + "9" * 5000 + "}",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, whose weights have an index, and `mcore`, its conversion."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny_model("qwen3"), root / "hf")
    names = list(load_file(root / "hf/model.safetensors"))
    (root / "hf/model.safetensors").rename(root / "hf/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (root / "hf" / INDEX).write_text(json.dumps(index))
    assert export(root / "hf", root / "mcore") == 0
    return root


def export(source: Path, output: Path, *words: object) -> int:
    kind = ["--model", source, *([] if "--template" in words else ["--model_type", "qwen3"]), "--to_mcore"]
    if (source / "latest_checkpointed_iteration.txt").is_file():
        kind = ["--mcore_model", source, "--to_hf"]
    return main([str(w) for w in ["export", *kind, "true", "--output_dir", output, *words]])


def refused(source: Path, name: str, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one-line error of an export; it names the file and leaves nothing."""
    capsys.readouterr()
    code = export(source, source.parent / "out", *words)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("swiftlite: error")]
    assert code in (1, 2), f"{name}: accepted"
    assert len(errors) == 1 and "the traceback: --debug true" not in errors[0] and len(errors[0]) < 5000, errors
    assert name in errors[0], errors[0]
    assert not [p.name for p in source.parent.iterdir() if "out" in p.name]
    return errors[0]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_json(damage: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = DAMAGES[damage]
    data = content.encode() if isinstance(content, str) else content
    names = {"hf": ["config.json", INDEX], "mcore": ["config.json", "manifest.json", "args.json"]}
    for side, files in names.items():
        shutil.copytree(made / side, tmp_path / side)
        for file in files:
            before = (tmp_path / side / file).read_bytes()
            (tmp_path / side / file).write_bytes(data)
            refused(tmp_path / side, file, capsys)
            (tmp_path / side / file).write_bytes(before)


def test_a_damaged_index_beside_a_single_file(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not followed, but a directory that was damaged is told."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf/model-00001-of-00001.safetensors").rename(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf" / INDEX).write_text('{"weight_map": ' + DEEP)
    refused(tmp_path / "hf", INDEX, capsys)


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(values)


WRONG: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any]]] = {
    **{f"{key} {value!r}": ("hf", "config.json", changed(**{key: value}))
       for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size",
                   "eos_token_id", "architectures", "head_dim")
       for value in (10**9, 1.5, "many", {"a": 1}, [None], True, -1) if not (key.endswith("id") and value in (10**9, -1))},
    "layers more than tensors": ("hf", "config.json", changed(num_hidden_layers=9999)),
    "no sizes": ("hf", "config.json", lambda c: [c.pop(k) for k in list(c) if k != "architectures"]),
    "quantization": ("hf", "config.json", changed(quantization_config="fp8")),
    "quantization inside": (
        "hf", "config.json", changed(quantization_config={"quant_method": "fp8", "weight_block_size": 3})),
    "theta": ("hf", "config.json", changed(rope_theta="big")),
    "index names numbers": ("hf", INDEX, changed(weight_map={"a": 3})),
    "index is a list": ("hf", INDEX, changed(weight_map=[1])),
    "index names a folder up": ("hf", INDEX, lambda c: c["weight_map"].update(x="../x.safetensors")),
    "index names the root": ("hf", INDEX, lambda c: c["weight_map"].update(x="/x.safetensors")),
    "index names nothing": ("hf", INDEX, lambda c: c["weight_map"].update(x="")),
    **{f"manifest writes {name!r}": ("mcore", "manifest.json",
                                     lambda c, name=name: [t.update(file=name) for t in c["tensors"].values()])
       for name in ("../x", "/tmp/x", "a/b", "", ".", "..", 3, None, "x\0y", ["x"], "config.json", ".safetensors\ud800",
                    "x" * 300 + ".safetensors")},
    "manifest dtype": ("mcore", "manifest.json", lambda c: [t.update(dtype="load") for t in c["tensors"].values()]),
    "manifest list": ("mcore", "manifest.json", changed(tensors=[1])),
    "manifest without files": ("mcore", "manifest.json", lambda c: [t.pop("file") for t in c["tensors"].values()]),
    "args": ("mcore", "args.json", changed(model_type=["qwen3"])),
    "args template": ("mcore", "args.json", changed(template={"a": 1})),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_values_of_a_wrong_kind(what: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    side, file, change = WRONG[what]
    shutil.copytree(made / side, tmp_path / side)
    content = json.loads((tmp_path / side / file).read_text())
    change(content)
    (tmp_path / side / file).write_text(json.dumps(content))
    refused(tmp_path / side, "config.json" if file == "config.json" else file, capsys)


SIDE: dict[str, list[str | bytes]] = {
    "tokenizer.json": ["{", DEEP, "[]", b"\xff", "{}", '{"model": 3}', '{"model": {}, "added_tokens": [{"id": "x"}]}'],
    "tokenizer_config.json": ["", '{"added_tokens_decoder": [1]}', '{"chat_template": [3]}', '{"eos_token": 5}',
                              '{"added_tokens_decoder": {"x": {"content": "a"}}}'],
    "special_tokens_map.json": ["[1]", '{"eos_token": {"id": 3}}'],
    "generation_config.json": ["{", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', '{"pad_token_id": {}}',
                               '{"temperature": "hot"}', '{"top_k": [1]}', '{"bos_token_id": 99999999999}',
                               '{"max_length": true}', '{"eos_token_id": 1.5}'],
    "vocab.json": ['{"a": "b"}', "[" * 9], "added_tokens.json": ['{"a": null}'], "chat_template.jinja": [b"\xff\xfe"],
    "chat_template.json": ["{"], "preprocessor_config.json": ["{"], "merges.txt": [b"\xff"],
}  # fmt: skip


@pytest.mark.parametrize("side", ["hf", "mcore"])
def test_damaged_side_files_are_told_before_any_work(
    side: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that a conversion only copies; the others would fail with them when they are used."""
    shutil.copytree(made / side, tmp_path / side)
    monkeypatch.setattr("swiftlite.cli.export.Checkpoint.open", lambda *_, **__: pytest.fail("work was begun"))
    for file, contents in SIDE.items():
        path = tmp_path / side / file
        before = path.read_bytes() if path.is_file() else None
        for content in contents:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            refused(tmp_path / side, file, capsys)
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("command", ["infer --prompt hi", "megatron sft --dataset x.jsonl", "sft --dataset x.jsonl"])
def test_end_tokens_that_are_none(
    command: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "x.jsonl").write_text('{"query": "a", "response": "b"}\n')
    (tmp_path / "hf/generation_config.json").write_text('{"eos_token_id": "x"}')
    assert main([*command.split(), "--model", str(tmp_path / "hf"), "--model_type", "qwen3"]) == 1
    assert "hf/generation_config.json holds something unexpected (eos_token_id is 'x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", [{"hidden_size": 10**9}, {"hidden_size": 10**6}, {"intermediate_size": 10**7}, {"head_dim": 128},
             {"hidden_size": 128}, {"vocab_size": 4096}],
)  # fmt: skip
@pytest.mark.parametrize("origin", ["hf", "mcore"])
def test_a_plan_of_sizes_that_the_files_do_not_have(
    size: dict[str, int], origin: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a training on Megatron would find out when it loads; without files too where no model is of that size."""
    pytest.importorskip("megatron.core")
    shutil.copytree(made / origin, tmp_path / origin)
    config = {**json.loads((made / "hf/config.json").read_text()), **size}
    (tmp_path / origin / "config.json").write_text(json.dumps(config))
    flag = ["--mcore_model"] if origin == "mcore" else ["--model_type", "qwen3", "--model"]
    words = [
        "megatron",
        "sft",
        *flag,
        str(tmp_path / origin),
        "--dry_run",
        "true",
        "--gpus",
        "1",
        "--max_length",
        "100",
    ]
    assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the traceback: --debug true" not in error and str(tmp_path / origin) in error or "tensor" in error, error
    if origin == "hf" and size == {"hidden_size": 10**9}:
        for path in [*(tmp_path / "hf").glob("*.safetensors"), tmp_path / "hf" / INDEX]:
            path.unlink()
        assert main(words) == 1
        assert "hidden_size is 1000000000; allowed: 0 to" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "\u00b2", "9" * 5000, "-1", "../..", "\x1b[2J", "iter_1"])
def test_tracker(text: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "mcore", tmp_path / "mcore")
    (tmp_path / "mcore/latest_checkpointed_iteration.txt").write_text(text)
    assert "\x1b" not in refused(tmp_path / "mcore", "latest_checkpointed_iteration.txt", capsys)


def test_tokenizer_files_where_the_type_is_found_out(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    for file, text in (
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'), ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("tokenizer_config.json", '{"chat_template": 5}'), ("tokenizer_config.json", "{"),
    ):  # fmt: skip
        (tmp_path / "hf" / file).write_text(text)
        refused(tmp_path / "hf", file, capsys, "--template", "qwen3")


@pytest.mark.parametrize(
    "entry",
    [{"data_offsets": [0, 1, 2]}, {"data_offsets": []}, {"data_offsets": [0, float("inf")]}, {"data_offsets": [-8, 0]},
     {"data_offsets": 3}, {"shape": "64"}, {"shape": [1 << 70]}, {"shape": [-1, -64]}, {"shape": [1.5]}, {"shape": None},
     {"dtype": ["F32"]}, {"dtype": "C64"}, {"dtype": None}],
)  # fmt: skip
def test_safetensors_header(
    entry: dict[str, Any], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    path = tmp_path / "hf/model-00001-of-00001.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"].update(entry)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(tmp_path / "hf", path.name, capsys)


def test_links_out_of_the_directory(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A private file is neither copied nor read as weights or config; the hub's cache is made of links and works."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "private").write_text("PRIVATE")
    (tmp_path / "hf/LICENSE").symlink_to(tmp_path / "private")
    (tmp_path / "hf/vocab.txt").symlink_to("config.json")
    assert export(tmp_path / "hf", tmp_path / "first") == 0
    assert not (tmp_path / "first/LICENSE").exists() and (tmp_path / "first/vocab.txt").is_file()
    assert "LICENSE is left out: a link out of the model's directory" in capsys.readouterr().err
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        real = (tmp_path / "hf" / name).rename(tmp_path / f"moved-{name}")
        (tmp_path / "hf" / name).symlink_to(real)
        refused(tmp_path / "hf", name, capsys)
        (tmp_path / "hf" / name).unlink()
        real.rename(tmp_path / "hf" / name)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/abc", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((made / "hf").iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert export(snapshot, tmp_path / "second") == 0
    assert (tmp_path / "second/tokenizer.json").is_file() and not (tmp_path / "second/tokenizer.json").is_symlink()


def test_names_are_escaped_and_cut(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    (tmp_path / "hf" / INDEX).unlink()
    path = tmp_path / "hf/model-00001-of-00001.safetensors"
    tensors = load_file(path)
    for name in ("\x1b[2J\x1b]0;owned\x07\u202e", "n" * 1_000_000, "n " * 500_000):
        save_file({**tensors, name: torch.zeros(1)}, path)
        error = refused(tmp_path / "hf", "unknown tensor", capsys)
        assert error.isprintable() and len(error) < 5000


def test_a_file_too_large_is_not_read(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    os.truncate(tmp_path / "hf/config.json", MAX_JSON_BYTES + 1)  # a hole
    assert "too much for a file of its kind" in refused(tmp_path / "hf", "config.json", capsys)


@pytest.mark.parametrize(("size", "rank"), [("2", None), ("x", None), ("2", "y"), ("1", "z")])
def test_leftovers_of_a_launcher(
    size: str, rank: str | None, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert export(made / "hf", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"swiftlite: error: ?(\[rank .\] )?(WORLD_SIZE|RANK) is", error), error
