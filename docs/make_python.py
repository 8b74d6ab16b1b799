"""The reference of the Python interface from docstrings, which the site's page python.md ends with."""

from __future__ import annotations

import inspect
import re
import sys

import swiftlite
from swiftlite import api

API = ("train", "Run", "convert", "Checkpoint")


def _entry(name: str, thing: object, where: str) -> list[str]:
    signature = str(inspect.signature(thing)) if callable(thing) else ""  # type: ignore[arg-type]
    signature = re.sub(r"'([^']*)'", r"\1", signature).removesuffix(" -> None")
    text = inspect.cleandoc(thing.__doc__ or "")
    text = re.sub(r"^(Args|Returns|Raises):", r"\n**\1**:", text, flags=re.M)
    lines = [f"### {name}\n", f"```python\n{where}.{name}{signature}\n```\n", text, ""]
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if not member.startswith("_") and inspect.isfunction(inner) and inner.__doc__:
                first = inspect.cleandoc(inner.__doc__).split("\n\n")[0].replace("\n", " ")
                brackets = "" if isinstance(value, property) else "()"
                lines.append(f"- `{member}{brackets}`: {first}")
    return lines


def reference() -> str:
    """Markdown: what is in swiftlite.api, then what is in swiftlite."""
    lines = ["\n## swiftlite.api\n"]
    for name in API:
        lines += _entry(name, getattr(api, name), "swiftlite.api")
    lines.append("\n## swiftlite\n")
    for name in swiftlite.__all__:
        if name not in ("__version__", *API):
            lines += _entry(name, getattr(swiftlite, name), "swiftlite")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
