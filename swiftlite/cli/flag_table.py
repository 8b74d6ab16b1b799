"""Every flag and what it does here: `python -m swiftlite.cli.flag_table > docs/flags.md`.

Read from the fields of the arguments and their notes; a test parses each flag and fails if docs/flags.md is not what
this module writes.
"""

from __future__ import annotations

import sys

from swiftlite.arguments.deploy import DeployArguments
from swiftlite.arguments.evaluate import EvalArguments
from swiftlite.arguments.export import ExportArguments
from swiftlite.arguments.infer import InferArguments
from swiftlite.arguments.megatron_preference import MegatronDpoArguments
from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.arguments.parser import Arguments, alias_table, notes, specs
from swiftlite.arguments.preference import DpoArguments
from swiftlite.arguments.train import SftArguments

# Title, arguments, and those of a section above whose rows are not repeated.
SECTIONS: tuple[tuple[str, type[Arguments], type[Arguments] | None], ...] = (
    ("`swiftlite export` and `swiftlite megatron export`", ExportArguments, None),
    ("`swiftlite megatron sft` and `megatron pt`", MegatronSftArguments, None),
    ("`megatron dpo` and `rlhf`, where they differ from `megatron sft`", MegatronDpoArguments, MegatronSftArguments),
    ("`swiftlite sft` and `pt`, where they differ from `megatron sft`", SftArguments, MegatronSftArguments),
    ("`swiftlite dpo` and `rlhf`, where they differ from `sft`", DpoArguments, SftArguments),
    ("`swiftlite infer`, where it differs from `sft`", InferArguments, SftArguments),
    ("`swiftlite eval`, where it differs from `infer`", EvalArguments, InferArguments),
    ("`swiftlite deploy`, where it differs from `infer`", DeployArguments, InferArguments),
)


def status(cls: type[Arguments], flag: str) -> tuple[str, str]:
    """(acts | default only | default here | rejected, explanation) of a flag of a command."""
    name = alias_table(cls).get(flag)
    note = notes(cls).get(name or flag)
    if note is not None:
        return "default here" if note.kind == "default" else note.kind, note.reason
    if name is None:
        return "rejected", "unknown"
    spec = specs(cls)[name]
    return "acts", spec.help if name == flag else f"as `--{name}`: {spec.help}"


def rows(cls: type[Arguments], other: type[Arguments] | None = None) -> dict[str, tuple[str, str]]:
    """Status of all that may be typed: fields, each followed by its other names, then flags of other tools.

    other: leaves out what is the same there.
    """
    fields = [name for spec in specs(cls).values() for name in (spec.name, *spec.aliases)]
    found = {flag: status(cls, flag) for flag in [*fields, *notes(cls)]}
    return {flag: said for flag, said in found.items() if other is None or said != status(other, flag)}


def table() -> str:
    """The text of docs/flags.md."""
    lines = [
        "# Flags",
        "",
        "Written by `python -m swiftlite.cli.flag_table`.",
        "",
        "- *acts*: it does what it says.",
        "- *default here*: accepted; swiftlite does this anyway.",
        "- *default only*: another value than the default is an error that gives the reason.",
        "- *rejected*: an error that gives the reason.",
    ]
    for title, cls, other in SECTIONS:
        lines += ["", f"## {title}", "", "| flag | here | |", "|---|---|---|"]
        for flag, (kind, text) in rows(cls, other).items():
            lines.append(f"| `--{flag}` | {kind} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
