"""`swiftlite port SCRIPT.sh`: what a shell script written for ms-swift or Megatron-SWIFT comes to here, flag by flag.

The script is read, never run: variables that it sets to plain text are filled in, substitutions stay as they are typed.
Imports no torch.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from swiftlite.arguments.groups import GROUP_FLAGS
from swiftlite.arguments.parser import Arguments, alias_table, notes, parse, specs, split_argv
from swiftlite.arguments.port import PortArguments
from swiftlite.arguments.task import JUDGING_WORDS
from swiftlite.cli.routes import ELSEWHERE, ROUTES
from swiftlite.utils.errors import SwiftliteError, UsageError
from swiftlite.utils.text import one_line

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?[-=]([^}]*))?\}|(\w+))")
_ARRAY = re.compile(r"\s*(?:(?:declare|local|readonly|export|typeset)\s+(?:-\w+\s+)*)?([A-Za-z_]\w*)(\+?)=\(")
_ALL_OF_ARRAY = re.compile(r'"?\$\{(\w+)\[[@*]\]\}"?')
_HERE = re.compile(r"<<-?\s*['\"]?([A-Za-z_]\w*)['\"]?")
# Other ways to start swift: its files and modules, by python, torchrun and the like.
_LAUNCHERS = re.compile(r"(?:.*/)?(?:python[\d.]*|torchrun|accelerate|deepspeed)")
# Programs that run the one which follows among their words, or text that is a script itself.
_RUNNERS = {"srun", "timeout", "uv", "docker", "podman", "xargs", "numactl", "stdbuf", "nice", "taskset", "mpirun",
            "mpiexec", "singularity", "apptainer", "poetry", "pixi", "conda", "setsid"}  # fmt: skip
_SHELLS = {"bash", "sh", "zsh", "ssh", "eval", "tmux", "screen"}
_TO_A_SHELL = re.compile(rf"\s*(?:{'|'.join(sorted(_SHELLS))})\b")
_FILE_OR_MODULE = re.compile(r"(?:.*/)?swift/cli/(_megatron/)?(\w+)\.py|swift\.cli\.(_megatron\.)?(\w+)")
_WHICH = re.compile(r"(?:\$\(|`)(?:which|command -v) (\w+)(?:\)|`)")
_PROCESSES = {"nproc_per_node": "NPROC_PER_NODE", "num_processes": "NPROC_PER_NODE", "num_gpus": "NPROC_PER_NODE",
              "nnodes": "NNODES", "node_rank": "NODE_RANK", "master_addr": "MASTER_ADDR",
              "master_port": "MASTER_PORT"}  # fmt: skip
_SUBSTITUTED = re.compile(r"\$\(\((.*?)\)\)|\$\(expr (.*?)\)|`expr (.*?)`")
_ARITHMETIC = re.compile(r"[\d\s+*/()-]+")
_PROGRAMS = {"swift", "megatron", "swiftlite"}
# Environment variables that are flags here.
_SETTINGS = {name.upper() for name in (*GROUP_FLAGS, *JUDGING_WORDS, "infonce_hard_negatives")}
_ENDS = {";", "&", "&&", "||", "|", "(", ")", "{", "}", "then", "do", "else", "nohup", "exec", "time", "sudo", "env"}
_NOTHING = re.compile(r"`\s*#[^`]*`")  # a comment between lines that continue
_UNFINISHED = re.compile(r"\$\([^()]*\)|`[^`]*`")


@dataclass
class Found:
    """A command of the script: the line it begins in, its environment, words after the program."""

    line: int
    environment: list[str]
    words: list[str]


@dataclass
class Ported:
    """What a command comes to. rows: (flag, what it does here, what to change). runs: unchanged."""

    command: list[str]
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    runs: bool = True


def port_main(args: PortArguments) -> dict[str, int]:
    """Print each command of the script with its table. Returns: {"exit_code": 0 if all run unchanged, else 1}."""
    path = Path(args.script[0])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a script ({one_line(error)})") from None
    commands = list(find_commands(text))
    if not commands:
        raise UsageError(f"{path}: holds no `swift ...` or `megatron ...` command")
    good = True
    for found in commands:
        environment, settings = _settings(found.environment)
        ported = port([*found.words, *settings])
        good &= ported.runs
        line = " ".join([*environment, *map(_quote, ported.command)])
        sys.stdout.write(f"# line {found.line}: {'runs unchanged' if ported.runs else 'needs changes'}\n{line}\n\n")
        sys.stdout.write("| flag | here | to change |\n|---|---|---|\n")
        for row in ported.rows:
            sys.stdout.write("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |\n")
        sys.stdout.write("\n")
    return {"exit_code": 0 if good else 1}


def _settings(environment: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what stays environment, words of flags): settings of losses that ms-swift reads from the environment."""
    kept, words = [], list[str]()
    for assigned in environment:
        name, _, value = assigned.partition("=")
        if name in _SETTINGS:
            words += [f"--{name.lower()}", *shlex.split(value)]
        else:
            kept.append(assigned)
    return kept, words


def _quote(word: str) -> str:
    return f'"{word}"' if _open(word) and '"' not in word else shlex.quote(word)


def _open(word: str) -> bool:
    """Does the shell put something here that the script alone does not say?"""
    return "$" in word or "`" in word


def find_commands(text: str) -> Iterator[Found]:
    """The commands of a script whose program is swift or megatron. Raises: UsageError for quotes that do not end."""
    variables: dict[str, str] = {}
    arrays: dict[str, list[str]] = {}
    for number, line in _lines(text):
        try:
            words = _split(_fill(line, variables, arrays))
        except ValueError as error:
            if not _PROGRAMS & set(line.split()):
                continue
            raise UsageError(f"line {number}: {str(error).lower()}") from None
        array = _ARRAY.match(line)
        if array:
            begin = next(i for i, word in enumerate(words) if word.startswith("("))
            items = [word for word in words[begin + 1 :] if word not in ("(", ")")]
            arrays[array[1]] = [*(arrays.get(array[1], []) if array[2] else []), *items]
            continue
        environment: list[str] = []
        while words:
            word = words.pop(0)
            assigned = _ASSIGNED.fullmatch(word)
            if word in _ENDS or word == "export":
                environment = environment if word in ("nohup", "exec", "time", "sudo", "env") else []
                continue
            if assigned:
                variables[assigned[1]] = assigned[2]
                environment.append(f"{assigned[1]}={shlex.quote(assigned[2])}")
                continue
            end = next((i for i, w in enumerate(words) if w and set(w) <= set(";&|()<>")), len(words))
            is_function = end == 0 and words[:1] == ["()"]
            end -= 0 < end < len(words) and words[end][0] in "<>" and words[end - 1].isdigit()  # 2>&1
            found = None if is_function else _command([word, *words[:end]])
            if word in _SHELLS or word in _RUNNERS and found is None:
                scripts = [" ".join(words[:end])] if word == "eval" else [w for w in words[:end] if " " in w]
                for script in scripts:
                    yield from (replace(each, line=number) for each in find_commands(script))
            if found is not None:
                yield Found(number, [*environment, *found[0]], found[1])
            else:  # another program: its words are no commands
                end = next((i for i, w in enumerate(words) if w in _ENDS), len(words))
            words, environment = words[end:], []


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    return list(lexer)


def _command(words: list[str]) -> tuple[list[str], list[str]] | None:
    """(what a launcher says as environment, swift's own words) if these are a command of swift."""
    program = Path(words[0]).name
    if program in _PROGRAMS and ":" not in words[0]:
        return [], ["megatron", *words[1:]] if program == "megatron" else words[1:]
    if program in _RUNNERS:
        return next(filter(None, (_command(words[i:]) for i in range(1, len(words)) if words[i])), None)
    if not _LAUNCHERS.fullmatch(words[0]):
        return None
    environment = []
    for i, word in enumerate(words[1:], 1):
        name, equals, value = word.lstrip("-").replace("-", "_").partition("=")
        if word.startswith("--") and name in _PROCESSES:
            value = word.partition("=")[2] if equals else "".join(words[i + 1 : i + 2])
            environment.append(f"{_PROCESSES[name]}={_quote(value)}")
        file, which = _FILE_OR_MODULE.fullmatch(word), _WHICH.fullmatch(word)
        if file:
            name = (file[2] or file[4]).replace("merge_lora", "merge-lora")
            side = ["megatron"] if file[1] or file[3] else []
            return environment, [*side, *([] if name == "main" else [name]), *words[i + 1 :]]
        if which or Path(word).name in _PROGRAMS and "/" in word:
            inner = _command([which[1] if which else word, *words[i + 1 :]])
            return inner and ([*environment, *inner[0]], inner[1])
    return None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, line) with continuations and open quotes joined."""
    held, here = "", ""
    began = 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if here:  # text that the shell passes on
            here = "" if line.strip() == here else here
            continue
        if not held:
            began = number
        bare = line.rstrip()
        if held and bare.lstrip().startswith("#"):  # ends a command, unless more of its flags follow
            following = lines[number].lstrip() if number < len(lines) else ""
            if not following.startswith(("--", "#")) and not _ARRAY.match(held):
                yield began, held
                held = ""
            continue
        if bare.endswith("\\"):
            held += bare[:-1] + " "
            continue
        held += bare
        if number < len(lines) and _is_open_text(held):
            held += "\n"
            continue
        opened = _HERE.search(held)
        here = opened[1] if opened and "<<<" not in held and not _TO_A_SHELL.match(held) else ""
        yield began, held
        held = ""
    if held:
        yield began, held


def _is_open_text(line: str) -> bool:
    """Does a quote or an array go on in the next line?"""
    try:
        words = _split(line)
    except ValueError:
        return True
    return bool(_ARRAY.match(line)) and not any(set(word) <= set(";&|()<>") and ")" in word for word in words)


def _fill(line: str, variables: dict[str, str], arrays: dict[str, list[str]]) -> str:
    """Variables that the script has set, and sums of whole numbers, filled in; single quotes are not looked at."""
    line = _ALL_OF_ARRAY.sub(
        lambda found: " ".join(map(_quote, arrays[found[1]])) if found[1] in arrays else found[0], line
    )

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, match[2] if match[2] is not None else match[0])

    def number(match: re.Match[str]) -> str:
        formula = next(part for part in match.groups() if part is not None).replace("\\", "")
        formula = re.sub(r"\b([A-Za-z_]\w*)\b", lambda name: variables.get(name[1], name[1]), formula)
        return str(_whole(formula)) if _ARITHMETIC.fullmatch(formula) else match[0]

    def filled(part: str) -> str:
        if part.startswith("'"):
            return part
        part = _SUBSTITUTED.sub(number, _VARIABLE.sub(value, _NOTHING.sub("", part)))
        return part if part.startswith('"') else _UNFINISHED.sub(lambda match: f"'{match[0]}'", part)

    return "".join(map(filled, re.split(r"""('[^']*'|"[^"]*")""", line)))


def _whole(formula: str) -> int:
    """`16 / 2 * 3` from left to right, products first, as the shell does with whole numbers; no brackets."""
    total, sign = 0, 1
    for term in re.split(r"([+-])", formula.replace("(", " ").replace(")", " ")):
        if term in ("+", "-"):
            sign = 1 if term == "+" else -1
            continue
        factors = re.split(r"([*/])", term)
        product = int(factors[0] or 0)
        for operator, factor in zip(factors[1::2], factors[2::2], strict=True):
            product = product * int(factor) if operator == "*" else product // max(int(factor), 1)
        total += sign * product
    return total


def port(words: list[str]) -> Ported:
    """What `swift`'s or `megatron`'s words come to here."""
    length = next((n for n in (2, 1) if tuple(words[:n]) in ROUTES), 0)
    if not length:
        name = " ".join(words[:2] if words[:1] == ["megatron"] else words[:1])
        reason = ELSEWHERE.get(name, "no such command; see `swiftlite --help`")
        return Ported(["swiftlite", *words], [(name, "is not a command here", reason)], runs=False)
    module, _, name = ROUTES[tuple(words[:length])].arguments.partition(":")
    cls: type[Arguments] = getattr(importlib.import_module(module), name)
    ported = Ported(["swiftlite", *words])
    positional, flags = split_argv(words[length:])
    for flag, times in flags.items():
        ported.rows.append(_row(cls, flag, times[-1]))
    texts = {name for name, spec in specs(cls).items() if "str" in str(spec.type)}
    kept = [
        (flag, times[-1])
        for (flag, times), row in zip(flags.items(), ported.rows, strict=True)
        if not row[2] and (alias_table(cls).get(flag) in texts or not any(map(_open, times[-1])))
    ]
    try:
        parse(cls, [*positional, *(word for flag, values in kept for word in (f"--{flag}", *values))])
    except SwiftliteError as error:
        ported.rows.append(("(together)", "refused", str(error)))
    ported.runs = not any(row[2] for row in ported.rows)
    return ported


def _row(cls: type[Arguments], flag: str, values: list[str]) -> tuple[str, str, str]:
    """(flag with its value, what it does here, what to change)."""
    name, shown = alias_table(cls).get(flag, flag), " ".join([f"--{flag}", *values])
    note, spec = notes(cls).get(name), specs(cls).get(name)
    if spec is None and note is None:
        return shown, "unknown", "leave it out; see docs/flags.md"
    if note is not None and note.kind == "rejected":
        return shown, "refused", note.reason
    if note is not None and note.kind == "default":
        if note.allowed is not None and " ".join(values or ["true"]).lower() not in note.allowed:
            return shown, "refused", f"only {' or '.join(note.allowed)}: {note.reason}"
        return shown, f"not needed: {note.reason}", ""
    assert spec is not None
    if any(map(_open, values)):
        return shown, f"acts: {spec.help}", ""
    try:
        value = spec.convert(values if len(values) != 1 else values[0]) if values else True
        if note is not None and value not in (spec.default, False, None, *(note.allowed or ())):
            return shown, "refused", note.reason
    except UsageError as error:
        return shown, "refused", str(error)
    return shown, f"acts{'' if name == flag else f' as --{name}'}: {spec.help}", ""
