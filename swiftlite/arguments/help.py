"""The text of `COMMAND --help`: what people need first, everything, or the flags that a word finds."""

from __future__ import annotations

import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass

from swiftlite.arguments.parser import Arguments, Spec, notes, show_value, specs

# Parts as people fill them in; those that are not here follow, ADVANCED ones last.
OWN = "what the command itself declares"
ORDER = ("ModelArguments", "McoreArguments", "DataArguments", OWN, "TunerArguments", "TrainArguments", "ParallelArguments",
         "GenerationArguments", "EngineArguments", "RunArguments", "TemplateArguments", "PlanArguments")  # fmt: skip
LEFT = 34  # columns of a flag and its value
_LONGEST_CHOICES = 40  # characters of a list of values that stands in place of TEXT


@dataclass(frozen=True)
class Command:
    """What help says of a command besides its flags. name: `swiftlite sft`; example: a whole command line."""

    name: str
    about: str = ""
    example: str = ""
    launch: bool = False


def format_help(cls: type[Arguments], command: Command, wanted: Sequence[str] = (), width: int | None = None) -> str:
    """Flags grouped by the part of the arguments that declares them.

    wanted: nothing, for what people need first; `all`; or words, for the flags whose names, other names or help have one.
    width: of the lines (default: the terminal's, 70 to 110).
    """
    width = width or min(max(shutil.get_terminal_size((100, 24)).columns, 70), 110)
    offered = [spec for spec in specs(cls).values() if spec.name not in notes(cls)]
    words = [] if "all" in wanted else [word.lstrip("-").replace("-", "_").lower() for word in wanted]
    first = [spec for spec in offered if (spec.common or spec.name == cls.POSITIONAL) and spec.name not in cls.LATER]
    few = not wanted and len(first) > (cls.POSITIONAL is not None)
    shown = first if few else [spec for spec in offered if _has(words, spec.name, *spec.aliases, spec.help)]
    lines = [usage_line(cls, command.name)]
    if not words:
        lines += [
            *textwrap.wrap(command.about, width),
            *(["", "example:", f"  {command.example}"] if command.example else []),
        ]
    for owner, members in _groups(cls, shown):
        lines += ["", *textwrap.wrap((owner.__doc__ or owner.__name__).strip().splitlines()[0], width)]
        for spec in members:
            lines += _entry(_flag(cls, spec), _text(spec, not few), width)
    if words:
        lines += _of_other_tools(cls, words, width)
        if len(lines) == 1:
            lines += ["", f"no flag's name or help has {' or '.join(wanted)}"]
    lines += ["", *_last_lines(command, len(offered) - len(shown), not wanted)]
    return "\n".join(lines)


def usage_line(cls: type[Arguments], name: str) -> str:
    return f"usage: {name} {_positional(cls) if cls.POSITIONAL else '[CONFIG.yaml]'} [--flag value ...]"


def _positional(cls: type[Arguments]) -> str:
    return f"{str(cls.POSITIONAL).upper()} ..."


def _last_lines(command: Command, hidden: int, first: bool) -> list[str]:
    lines = [f"{hidden} more flags: `{command.name} --help all`, or `--help WORD`"] if hidden else []
    if first and command.launch:
        lines.append("Several processes: put NPROC_PER_NODE=8 before the command.")
    return lines


def _groups(cls: type[Arguments], shown: Iterable[Spec]) -> list[tuple[type, list[Spec]]]:
    groups: dict[type, list[Spec]] = {}
    for spec in shown:
        groups.setdefault(spec.owner, []).append(spec)

    def place(group: tuple[type, list[Spec]]) -> tuple[bool, int]:
        owner = group[0]
        name = OWN if owner is cls else owner.__name__
        return "ADVANCED" in owner.__dict__, ORDER.index(name) if name in ORDER else len(ORDER)

    return sorted(groups.items(), key=place)


def _has(words: Sequence[str], *texts: str) -> bool:
    """Is there no word to look for, or is one of them in a text?"""
    return not words or any(word in text.lower().replace("-", "_") for word in words for text in texts)


def _of_other_tools(cls: type[Arguments], words: Sequence[str], width: int) -> list[str]:
    """Flags with one of the words that do not act: other tools', or of other commands."""
    found = {name: note for name, note in notes(cls).items() if _has(words, name)}
    lines = ["", "Flags that other tools or commands have"] if found else []
    for name, note in found.items():
        kind = {"default": "not needed", "rejected": "refused"}.get(note.kind, "only the default")
        lines += _entry(f"--{name}", f"{kind}: {note.reason}", width)
    return lines


def _entry(flag: str, text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width - LEFT, break_long_words=False, break_on_hyphens=False) or [""]
    if len(flag) + 4 > LEFT:
        return [f"  {flag}", *(" " * LEFT + line for line in lines)]
    return [f"  {flag:<{LEFT - 2}}{lines[0]}", *(" " * LEFT + line for line in lines[1:])]


def _flag(cls: type[Arguments], spec: Spec) -> str:
    if spec.name == cls.POSITIONAL:
        return _positional(cls)
    listed = "|".join(spec.choices or ())
    value = listed if 0 < len(listed) <= _LONGEST_CHOICES else metavar(spec.type, spec.path)
    return f"--{spec.name} {value}{' ...' if value == listed and typing.get_origin(spec.type) is list else ''}"


def _text(spec: Spec, aliases: bool) -> str:
    facts = [spec.help]
    if spec.choices is not None and len("|".join(spec.choices)) > _LONGEST_CHOICES:
        facts.append("one of " + ", ".join(spec.choices))
    if spec.default not in (None, "", MISSING, [], {}) and spec.default is not False and "(default" not in spec.help:
        facts.append(f"default {show_value(spec.default)}")
    if spec.aliases and aliases:
        facts.append("also " + ", ".join(f"--{alias}" for alias in spec.aliases))
    return "; ".join(filter(None, facts))


def metavar(hint: object, path: bool = False) -> str:
    """What stands for a value: `N`, `true|false`, `PATH ...`."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(metavar(option, path) for option in options))
    if typing.get_origin(hint) is list:
        return f"{metavar(options[0], path)} ..."
    names: dict[object, str] = {bool: "true|false", int: "N", float: "X", str: "PATH" if path else "TEXT", dict: "JSON"}
    return names.get(typing.get_origin(hint) or hint, "VALUE")
