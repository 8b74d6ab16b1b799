"""docs/templates.md holds the table of the registry. `UPDATE_DOCS=1 pytest tests/llm/template` rewrites it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from swiftlite.families.templates import TEMPLATES

sys.path.insert(0, str(Path(__file__).parent))
import official

DOCS = Path(__file__).parents[3] / "docs" / "templates.md"
# Templates without a published Jinja of their own in the tests: written as a sibling's Jinja does.
SIBLINGS = {
    "qwq_preview": "qwen2_5",
    "qwen2_5_math": "qwen2_5",
    "mimo_rl": "qwen2_5",
    "qwen3_thinking": "qwen3, prompt opens a thought block",
    "yi_coder": "qwen2",
}
HEAD = """# Chat templates

What a model sees in training is what its published chat template (Jinja) writes, character for character; token ids are
those of that text. The table says where each template's text comes from:

- **Jinja**: the published Jinja is reproduced and tests compare with it, on fixed and on random conversations.
- **sibling**: no Jinja of its own is at hand; a sibling's Jinja is reproduced, with its own default system message.
- **parts**: no Jinja is at hand; prefix, prompt, separator and suffix are joined round by round, as ms-swift does.

Training text is that text, plus the template's stop token where the Jinja prints none after the last answer (GLM-4.5:
`<|user|>`, or `<|observation|>` after a tool call). Labels cover what follows the generation prompt in each assistant
turn, and the first end token after it. A thought block that the generation prompt already holds is not learnt.

Where a checkpoint brings its own Jinja, it chooses among the variants of a template.

"""


def table() -> str:
    published: dict[str, list[str]] = {}
    for official_id in official.IDS:
        published.setdefault(official.template_type(official_id), []).append(official_id)
    lines = ["| template | text | thinking | tools | variants |", "|---|---|---|---|---|"]
    from swiftlite.llm.template.layouts import PRINTS_CALLS, PRINTS_TOOLS

    for meta in TEMPLATES:
        name = meta.template_type
        if name in published:
            source = f"Jinja: {', '.join(published[name])}"
        elif name in SIBLINGS:
            source = f"sibling: {SIBLINGS[name]}"
        else:
            assert meta.layout == "rounds", f"{name}: say in SIBLINGS where its text comes from"
            source = "parts"
        tools = "yes" if meta.layout in PRINTS_TOOLS else "calls only" if meta.layout in PRINTS_CALLS else ""
        thinking = "yes" if meta.template_cls == "ThinkingTemplate" else ""
        lines.append(f"| {name} | {source} | {thinking} | {tools} | {', '.join(meta.variants)} |")
    return "\n".join(lines) + "\n"


def test_table_is_current():
    text = HEAD + table()
    if os.environ.get("UPDATE_DOCS"):
        DOCS.write_text(text, encoding="utf-8")
    assert DOCS.read_text(encoding="utf-8") == text


def test_table_of_cases_is_current():
    """docs/template_cases.md: nothing differs. `python docs/make_template_cases.py` rewrites it."""
    sys.path.insert(0, str(DOCS.parent))
    import make_template_cases

    text = make_template_cases.text_part()
    written = make_template_cases.FILE.read_text(encoding="utf-8")
    assert written.startswith(text)
    cells = [cell.split(" / ") for line in written.splitlines() if line.startswith("| ") for cell in line.split(" | ")]
    numbers = [cell for cell in cells if len(cell) == 3]
    assert len(numbers) > 4 * len(official.IDS)
    assert all(cell[2].strip(" |") == "0" for cell in numbers), "different must be 0"
