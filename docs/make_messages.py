"""Every error that swiftlite raises, in its own words: the site's page messages.md, or `python docs/make_messages.py`.

Read from the code whenever the site is built, so that it cannot be out of date.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "swiftlite"
GAP = "..."  # what an error fills in
PROGRAMMERS = ("AssertionError", "AttributeError", "IndexError", "TypeError")  # mistakes in code that uses swiftlite
# Rooms of the code as sections, in the order in which people meet them.
SECTIONS = {
    "Flags and config files": ("arguments", "cli", "api.py"),
    "Data and chat templates": ("llm/dataset", "llm/template", "llm/preview.py"),
    "Models, checkpoints, hubs": ("checkpoint", "families"),
    "Conversion and files of weights": ("convert", "weights", "utils"),
    "Training with transformers, and answers": ("llm", "train"),
    "Training on Megatron": ("megatron", "plan"),
    "Self-tests": ("selftest",),
}
HEAD = """# Every error message

Search this page for the words of an error that do not change from case to case; `...` is what it fills in. Each message says
what is there, what is allowed and what to do; [troubleshooting](troubleshooting.md) has the rest. Exit codes: 2 for
UsageError, 1 for the others.
"""


@dataclass(frozen=True)
class Message:
    """An error of the code: the file that raises it (relative to the package), its class, its text."""

    file: str
    kind: str
    text: str


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return GAP


def messages() -> Iterator[Message]:
    """Errors that are raised with a text of some length; those that are put together elsewhere are not found."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # `raise UsageError(...)`, `wrong = UsageError(...)`
            named = isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name) and node.func.id
            if named and named.endswith("Error") and named not in PROGRAMMERS:
                text = " ".join(_text(node.args[0]).replace("......", GAP).split())
                if len(text.replace(GAP, "").strip(" :,;()")) > 12:
                    yield Message(path.relative_to(PACKAGE).as_posix(), named, text)


def section_of(file: str) -> str:
    """The longest matching place decides."""
    places = [(len(place), title) for title, rooms in SECTIONS.items() for place in rooms if file.startswith(place)]
    return max(places)[1] if places else "Models, checkpoints, hubs"


def page() -> str:
    found: dict[str, dict[Message, None]] = {title: {} for title in SECTIONS}
    for message in messages():
        found[section_of(message.file)][message] = None
    lines = [HEAD]
    for title, listed in found.items():
        lines += [f"\n## {title}\n", "| message | error | from |", "|---|---|---|"]
        for m in sorted(listed, key=lambda m: m.text.replace(GAP, "").lstrip(" -:").lower()):
            text = m.text.replace("`", "'").replace("|", "\\|")
            lines.append(f"| `{text}` | {m.kind} | `{m.file}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
