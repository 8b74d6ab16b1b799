"""Dataclass <-> flags and files: conversion, aliases, errors that say what to do."""

import json

import pytest

from swiftlite.arguments.parser import Arguments, Note, arguments, field, from_dict, parse, split_argv
from swiftlite.utils.errors import UsageError


@arguments
class Part(Arguments):
    """Part: shared settings"""

    lr: float = field(0.1, "learning rate", aliases=["learning_rate"])
    verbose: bool = field(False, "say more")


@arguments
class Demo(Part):
    """Demo: own settings"""

    NOTES = {
        "finetune": Note("default", "always so"),
        "strict": Note("default", "always strict", allowed=("true",)),
        "vllm": Note("rejected", "there is no vLLM here"),
    }

    files: list[str] = field([], "files")
    sizes: list[int] = field([1], "sizes")
    count: int | None = field(None, "how many", aliases=["num"])
    mode: str = field("a", "mode", choices=["a", "b"])
    columns: dict[str, str] = field({}, "renames")
    hidden: int = field(0, "not offered", unavailable={"Arguments": Note("rejected", "has no effect")})
    secret: int = field(0, "not offered, but explained", unavailable=Note("default", "chosen by itself"))
    packing: bool = field(False, "pack", unavailable={"Other": "not there", "Part": "not yet"})


def test_flags_are_converted_by_type():
    args = parse(Demo, ["--lr", "1e-3", "--verbose", "true", "--files", "a", "b", "--sizes", "2", "3", "--count", "-4",
                        "--columns", '{"x": "y"}'])  # fmt: skip
    assert (args.lr, args.verbose, args.files, args.sizes, args.count) == (1e-3, True, ["a", "b"], [2, 3], -4)
    assert args.columns == {"x": "y"}


@pytest.mark.parametrize("text, value", [("true", True), ("False", False), ("1", True), ("no", False)])
def test_booleans(text, value):
    assert parse(Demo, ["--verbose", text]).verbose is value


def test_bare_boolean_is_true_and_none_clears():
    args = parse(Demo, ["--count", "none", "--verbose"])
    assert args.verbose is True and args.count is None


def test_dashes_equals_and_values_that_begin_with_dashes():
    assert parse(Demo, ["--learning-rate=0.5", "--files=--x"]).files == ["--x"]
    assert split_argv(["c.yaml", "--a", "1", "2", "--b"]) == (["c.yaml"], {"a": [["1", "2"]], "b": [[]]})


def test_the_last_of_a_repeated_flag_counts_and_lists_are_joined(caplog):
    assert parse(Demo, ["--lr", "1", "--lr", "2"]).lr == 2
    assert parse(Demo, ["--files", "a", "--files", "b", "c", "--files=d"]).files == ["a", "b", "c", "d"]


def test_aliases_work_as_flag_keyword_and_attribute():
    assert parse(Demo, ["--learning_rate", "0.5"]).lr == 0.5
    assert Demo(learning_rate=0.25).lr == Demo(lr=0.25).learning_rate == 0.25


def test_two_names_of_one_setting_must_agree():
    assert parse(Demo, ["--lr", "0.5", "--learning_rate", "0.5"]).lr == 0.5
    with pytest.raises(UsageError, match="--lr and --learning_rate are two names of one setting but differ"):
        parse(Demo, ["--lr", "0.5", "--learning_rate", "0.6"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--learning_rte", "1"], "--learning_rte: unknown flag; did you mean --learning_rate"),
        (["--count", "many"], "--count many: must be a whole number"),
        (["--count", "1.5"], "--count 1.5: must be a whole number"),
        (["--count", "1", "2"], "--count 1 2: must be a whole number"),
        (["--lr", "true"], "--lr true: must be a number"),
        (["--verbose", "maybe"], "--verbose maybe: must be true or false"),
        (["--mode", "c"], "--mode c: must be one of a, b"),
        (["--columns", "{x"], "--columns {x: not JSON"),
        (["--count"], "--count: a value is missing"),
        (["--vllm", "1"], "--vllm: there is no vLLM here"),
        (["--strict", "false"], r"--strict false: only true \(always strict\)"),
        (["--hidden", "1"], "--hidden: has no effect"),
        (["--packing", "true"], "--packing true: not yet"),
        (["a.yaml", "b.yaml"], "b.yaml: unexpected word"),
        (["nowhere.yaml"], "nowhere.yaml: no such config file"),
    ],
)
def test_mistakes_are_usage_errors_of_one_line(argv, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse(Demo, argv)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_accepted_flags_without_a_field_change_nothing():
    argv = ["--finetune", "false", "--strict", "true", "--secret", "3", "--packing", "false"]
    assert parse(Demo, argv).to_dict() == Demo().to_dict()


@pytest.mark.parametrize("name, dump", [("c.json", json.dumps), ("c.yaml", json.dumps)])
def test_file_first_then_flags(tmp_path, name, dump):
    path = tmp_path / name
    path.write_text(dump({"learning_rate": 0.5, "files": ["a"], "verbose": True, "columns": {"a": "b"}}))
    args = parse(Demo, [str(path), "--lr", "0.7"])
    assert (args.lr, args.files, args.verbose, args.columns) == (0.7, ["a"], True, {"a": "b"})
    assert args.given == {"lr", "files", "verbose", "columns"}
    assert parse(Demo, ["--config", str(path)]).lr == 0.5


def test_yaml_spelling(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 1e-5\ncount: null\nfiles: a\nsizes: [4, 5]\n")
    args = parse(Demo, [str(path)])
    assert (args.lr, args.count, args.files, args.sizes) == (1e-5, None, ["a"], [4, 5])


@pytest.mark.parametrize(
    "text, message",
    [
        ("lrr: 1\n", "lrr: unknown setting; did you mean lr"),
        ("- 1\n", "must hold one mapping"),
        ("a: [\n", "cannot be read as YAML"),
        ("lr: {a: 1}\n", "--lr .*must be a number"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        parse(Demo, [str(path)])
    assert "\n" not in str(caught.value)


def test_defaults_are_not_shared():
    first, second = Demo(), Demo()
    first.files.append("a")
    assert second.files == [] and Demo().files == []


def test_number_keeps_its_spelling():
    assert str(parse(Demo, ["--lr", "0"]).lr) == "0.0" and str(Demo(lr=0).lr) == "0"


def test_from_dict_takes_aliases_and_refuses_unknown_names():
    assert from_dict(Demo, {"num": 3}).count == 3
    with pytest.raises(UsageError, match="unknown flag"):
        from_dict(Demo, {"nmu": 3})


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = Demo().nothing


def test_the_home_directory_in_paths(tmp_path, monkeypatch):
    @arguments
    class Paths(Arguments):
        """Paths"""

        save: str | None = field(None, "directory", path=True)
        files: list[str] = field([], "files", path=True)
        text: str = field("", "no path")

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("save: ~/out\nfiles: [~/a.jsonl, b~.jsonl]\ntext: ~/x\n")
    for words in (["~/run.yaml"], ["--save=~/out", "--files", "~/a.jsonl", "b~.jsonl", "--text=~/x"]):
        found = parse(Paths, words)
        assert (found.save, found.text) == (f"{tmp_path}/out", "~/x")
        assert found.files == [f"{tmp_path}/a.jsonl", "b~.jsonl"]
    assert Paths(save="~").save == str(tmp_path)
