"""`COMMAND --help` as people read it: what they need first, everything, what a word finds."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swiftlite.arguments.help import Command, format_help
from swiftlite.arguments.parser import Arguments, Note, arguments, field, notes, parse, specs
from swiftlite.cli.completion import bash
from swiftlite.cli.main import find_route, main
from swiftlite.cli.routes import ROUTES

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def width(monkeypatch):
    """Of the terminal: test workers say 80."""
    monkeypatch.setenv("COLUMNS", "100")


@arguments
class Part(Arguments):
    """Part: shared settings"""

    lr: float = field(0.1, "learning rate", aliases=["learning_rate"])


@arguments
class Demo(Part):
    """Demo: own settings"""

    NOTES = {"vllm": Note("rejected", "there is no vLLM here")}
    LATER = ("rarely",)

    files: list[str] = field([], "files", path=True, common=True)
    mode: str = field("a", "mode", choices=["a", "b"])
    rarely: int = field(0, "seldom here", common=True)
    hidden: int = field(0, "not offered", unavailable={"Arguments": Note("rejected", "has no effect")})


def arguments_of(words):
    module, _, name = ROUTES[words].arguments.partition(":")
    return getattr(importlib.import_module(module), name)


def test_first_what_is_needed_then_all():
    command = Command("swiftlite demo", "what it does", "swiftlite demo --files a", launch=True)
    first, everything = format_help(Demo, command), format_help(Demo, command, ["all"])
    assert first.splitlines()[:2] == ["usage: swiftlite demo [CONFIG.yaml] [--flag value ...]", "what it does"]
    assert "  swiftlite demo --files a" in first and "NPROC_PER_NODE=8" in first
    assert "--files PATH ..." in first and "--lr" not in first and "--rarely" not in first
    assert "3 more flags: `swiftlite demo --help all`" in first
    assert everything.index("Demo: own settings") < everything.index("Part: shared settings")
    assert "--mode a|b" in everything and "default 0.1; also --learning_rate" in everything
    assert "--rarely" in everything and "--hidden" not in everything and "more flags" not in everything


@pytest.mark.parametrize("word, found", [("lr", "--lr X"), ("learning-rate", "--lr X"), ("SELDOM", "--rarely N"),
                                         ("vllm", "refused: there is no vLLM here")])  # fmt: skip
def test_words_find_names_other_names_help_and_other_tools_flags(word, found):
    text = format_help(Demo, Command("swiftlite demo"), [word])
    assert found in text and text.count("  --") == 1


def test_a_word_that_is_nowhere_is_said():
    assert "no flag's name or help has zebra" in format_help(Demo, Command("x"), ["zebra"])


@pytest.mark.parametrize("words", ROUTES, ids=" ".join)
def test_help_of_each_command(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert main([*words, "--help"]) == 0
    first = capsys.readouterr().out
    assert main([*words, "--help", "all"]) == 0
    everything = capsys.readouterr().out
    for text in (first, everything):
        assert all(len(line) <= 90 or line.startswith("  ") for line in text.splitlines())
    flags = [set(re.findall(r"^  --(\w+)", text, re.M)) for text in (first, everything)]
    offered = {name for name in specs(arguments_of(words)) if name not in notes(arguments_of(words))}
    assert flags[1] == offered - {arguments_of(words).POSITIONAL} and flags[0] <= flags[1]
    assert len(flags[0]) <= 46
    if "model" in offered and len(offered) > 40:
        assert len(flags[0]) >= 15 and {"model", "output_dir"} & flags[0]


@pytest.mark.parametrize("words, flags", [("sft", "model dataset loss_type lr"), ("infer", "model val_dataset prompt seed"),
                                          ("deploy", "model host infer_backend seed")])  # fmt: skip
def test_the_model_and_the_data_stand_first(words, flags, capsys):
    main([words, "--help"])
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    assert shown[0] == "model" and [name for name in shown if name in flags.split()] == flags.split()


@pytest.mark.parametrize("words", ROUTES, ids=" ".join)
def test_examples_parse(words):
    typed = shlex.split(ROUTES[words].example)
    if words == ("completion",):
        typed = shlex.split(typed[1].strip("$()"))
    typed = typed[typed.index("swiftlite") + 1 :]
    found, route, rest = find_route(typed)
    assert route is ROUTES[words] and rest
    parse(arguments_of(found), rest)


def completed(*words):
    """What bash offers for the last of these words."""
    script = "\n".join(bash())
    typed = " ".join(map(shlex.quote, words))
    code = (
        f"{script}\nCOMP_WORDS=({typed})\nCOMP_CWORD={len(words) - 1}\n_swiftlite\nprintf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "words, some, none",
    [
        (["swiftlite", "in"], ["infer"], ["export"]),
        (["swiftlite", "megatron", ""], ["sft", "dpo"], ["infer"]),
        (["swiftlite", "sft", "--lora_r"], ["--lora_rank"], ["--lora_alpha"]),
        (["swiftlite", "megatron", "sft", "--tensor"], ["--tensor_model_parallel_size"], []),
        (["swiftlite", "sft", "--tensor_m"], [], ["--tensor_model_parallel_size"]),
        (["swiftlite", "sft", "--train_type", "l"], ["lora"], ["full"]),
        (["swiftlite", "sft", "--packing", ""], ["true", "false"], []),
    ],
)
def test_bash_completes(words, some, none):
    found = completed(*words)
    assert set(some) <= set(found) and not set(none) & set(found)


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(capsys):
    assert main(["completion", "fish"]) == 0
    script = capsys.readouterr().out
    for typed, some in [("in", "infer"), ("megatron ", "dpo"), ("megatron sft --tensor_m", "--tensor_model_parallel_size"),
                        ("sft --train_type l", "lora")]:  # fmt: skip
        words = ["fish", "-c", f"source -; complete -C 'swiftlite {typed}'"]
        done = subprocess.run(words, input=script, capture_output=True, text=True, check=True)
        assert some in [line.split("\t")[0] for line in done.stdout.splitlines()] and not done.stderr


def test_scripts_of_all_shells_name_every_command(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        text = capsys.readouterr().out
        assert all(word in text for words in ROUTES for word in words) and "lora_rank" in text
    assert main(["completion", "tcsh"]) == 2
    assert "name your shell, one of bash, zsh, fish" in capsys.readouterr().err


def test_completion_loads_nothing_heavy():
    code = (
        "import sys\nfrom swiftlite.cli.main import main\n"
        "assert main(['completion', 'bash']) == 0\n"
        "assert not {'torch', 'numpy', 'transformers', 'swiftlite.families'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
