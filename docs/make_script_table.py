"""How many commands of public scripts parse here: `python docs/make_script_table.py FILE.jsonl`, a Markdown table.

FILE: lines of {"command": "swift sft", "flags": {name: [words]}}. Nothing is run and no file is opened but FILE.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from swiftlite.arguments.parser import Arguments, parse
from swiftlite.cli.routes import ROUTES
from swiftlite.utils.errors import UsageError


def kind_of(row: Mapping[str, Any]) -> str:
    """`swift sft`, `megatron rlhf --rlhf_type dpo`, ..."""
    asked = row["flags"].get("rlhf_type") if row["command"].endswith("rlhf") else None
    return " ".join([row["command"], *(["--rlhf_type", *asked] if asked else [])])


def words_of(row: Mapping[str, Any]) -> list[str]:
    """The flags as typed. `--gradient_accumulation_steps 1 16 / 1` is how such data writes `$(expr 16 / 1)`: 16.

    JSON files of --fsdp are not here to be read: `fsdp2` stands for what is in those of ms-swift.
    """
    words = []
    for name, values in row["flags"].items():
        if name == "fsdp":
            values = ["fsdp2" if value.endswith(".json") else value for value in values]
        words += [f"--{name}", *(values[1:2] if "/" in values else values)]
    return words


def refusal(row: Mapping[str, Any]) -> str | None:
    """Why a command does not parse, None if it does."""
    route = ROUTES.get(tuple(row["command"].removeprefix("swift ").split()))
    if route is None:
        return f"no command {row['command']}"
    module, _, name = route.arguments.partition(":")
    cls: type[Arguments] = getattr(importlib.import_module(module), name)
    try:
        parse(cls, words_of(row))
    except UsageError as error:
        return str(error)
    return None


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: kind, parses, of, the reasons of the others."""
    parsed, total = Counter[str](), Counter[str]()
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        kind, why = kind_of(row), refusal(row)
        total[kind] += 1
        parsed[kind] += why is None
        if why is not None:
            reasons.setdefault(kind, Counter())[why.partition(":")[0]] += 1
    lines = ["| kind | parses | of | refused for |", "|---|---|---|---|"]
    for kind in sorted(total):
        shown = ", ".join(f"{why} {count}" for why, count in reasons.get(kind, Counter()).most_common(8))
        lines.append(f"| {kind} | {parsed[kind]} | {total[kind]} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.stdout.write(table(map(json.loads, Path(sys.argv[1]).read_text(encoding="utf-8").splitlines())))
