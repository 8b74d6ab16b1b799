"""`swiftlite completion SHELL`: a script that completes commands, flags and values, written from the fields.

argparse's libraries (shtab, argcomplete) need argparse's parser; ours is the fields. No torch is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import get_args

from swiftlite.arguments.completion import CompletionArguments
from swiftlite.arguments.parser import Arguments, Spec, notes, specs
from swiftlite.cli.routes import ROUTES

# What stands for a value: words, or files.
FILES = "\0files"


def values(spec: Spec) -> str:
    """What may follow a flag."""
    if spec.choices is not None:
        return " ".join(spec.choices)
    return "true false" if bool in (spec.type, *get_args(spec.type)) else FILES if spec.path else ""


def flags(words: tuple[str, ...]) -> list[Spec]:
    """Flags that act in a command."""
    module, _, name = ROUTES[words].arguments.partition(":")
    cls: type[Arguments] = getattr(importlib.import_module(module), name)
    return [spec for spec in specs(cls).values() if spec.name not in notes(cls) and spec.name != cls.POSITIONAL]


def bash() -> Iterator[str]:
    """Zsh runs it too, with bashcompinit. A flag's values are those in the first command that has it."""
    commands = {words: flags(words) for words in ROUTES}
    after: dict[str, str] = {}
    for spec in (spec for found in commands.values() for spec in found if values(spec)):
        after.setdefault(spec.name, values(spec))
    yield "_swiftlite() {"
    yield '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="${COMP_WORDS[1]}" found=""'
    yield '  if [ "$command" = megatron ] && [ "$COMP_CWORD" -gt 2 ]; then command="megatron ${COMP_WORDS[2]}"; fi'
    yield '  if [ "$COMP_CWORD" = 1 ]; then found="' + " ".join(dict.fromkeys(words[0] for words in ROUTES)) + '"; fi'
    yield '  if [ "$COMP_CWORD" = 2 ] && [ "$before" = megatron ]; then'
    yield '    found="' + " ".join(words[1] for words in ROUTES if len(words) > 1) + '"; fi'
    yield '  case "$before" in'
    for name, text in after.items():
        if text != FILES:
            yield f'    --{name}) found="{text}";;'
    yield '  esac\n  case "$word" in -*) case "$command" in'
    for words, found in commands.items():
        yield f'    "{" ".join(words)}") found="{" ".join(f"--{spec.name}" for spec in found)} --help";;'
    yield '  esac;; esac\n  COMPREPLY=($(compgen -W "$found" -- "$word"))\n}'
    yield "complete -o default -F _swiftlite swiftlite"  # default: files, where nothing is found


def zsh() -> Iterator[str]:
    yield "autoload -Uz bashcompinit compinit && compinit -u && bashcompinit"
    yield from bash()


def fish() -> Iterator[str]:
    """With what help says of each."""
    typed = '(string join " " -- (commandline -opc))'
    for words, route in ROUTES.items():
        begun = "".join(f" {word}" for word in words[:-1])
        yield (
            f"complete -c swiftlite -n 'string match -qr \"^\\S+{begun}\\$\" -- {typed}' "
            f"-f -a {words[-1]} -d {quoted(route.help)}"
        )
        where = f'string match -qr "^\\S+ {" ".join(words)}( |\\$)" -- {typed}'
        for spec in flags(words):
            said = values(spec)
            takes = "-r -F" if said == FILES else f"-x -a {quoted(said)}" if said else "-x"
            yield f"complete -c swiftlite -n '{where}' -l {spec.name} {takes} -d {quoted(spec.help)}"
    yield f"complete -c swiftlite -n 'string match -qr \"^\\S+\\$\" -- {typed}' -f -a megatron -d 'on megatron-core'"


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def completion_main(args: CompletionArguments) -> None:
    """Write the script to standard output."""
    lines = {"bash": bash, "zsh": zsh, "fish": fish}[args.shell[0]]()
    sys.stdout.write("\n".join(lines) + "\n")
