"""What mkdocs does beside rendering docs/*.md: pages that stand elsewhere in the repository or are written from the code.

Links in Markdown files are those of the repository, so that they work there; here they get the pages' names.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import make_messages  # noqa: E402
import make_python  # noqa: E402

# File in the repository -> page.
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/gpu/README.md": "gpu.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)]*)?\)")


def page_of(file: str) -> str | None:
    """The page that a file of the repository is on the site."""
    inside = file.removeprefix("docs/") if file.startswith("docs/") and file.endswith(".md") else None
    return ELSEWHERE.get(file, inside)


def with_site_links(text: str, source: str) -> str:
    """source: the file's path in the repository. Links to files that are no page become their names."""

    def link(match: re.Match[str]) -> str:
        shown, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / file).exists():
            return match[0]  # mkdocs says that it is broken
        page = page_of(file)
        return f"[{shown}]({page}{anchor})" if page else f"{shown} (`{file}`)"

    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("`") else _LINK.sub(link, part) for part in parts)


def on_files(files: Any, config: Mapping[str, Any]) -> Any:
    from mkdocs.structure.files import File

    made = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in ELSEWHERE.items() if page != "index.md"}
    made["messages.md"] = make_messages.page()
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Marks for site.css: flags, which must not break after `--`, and tables whose cells are sentences.

    Names in code may break at underscores, which does not change what is copied.
    """
    return re.sub(
        r"<table>.*?</table>", _table, re.sub(r"(?<!<pre>)(?<!</span>)<code>[^<]*</code>", _flags, content), flags=re.S
    )


def _flags(code: re.Match[str]) -> str:
    return re.sub(r"--(?:\w|<wbr>)+", r'<span class="flag">\g<0></span>', code[0].replace("_", "_<wbr>"))


def _table(table: re.Match[str]) -> str:
    cells = [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", table[0], re.S)]
    return f'<div class="sentences">{table[0]}</div>' if max(map(len, cells), default=0) > 60 else table[0]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = page.file.src_uri
    source = next((file for file, target in ELSEWHERE.items() if target == name and name != "index.md"), f"docs/{name}")
    if name == "models.md":
        page.meta["hide"] = ["toc"]  # one line of contents, beside a table that needs the room
    if name == "python.md":
        markdown += "\n" + make_python.reference()
    return with_site_links(markdown, source)
