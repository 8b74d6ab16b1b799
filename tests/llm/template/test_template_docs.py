"""docs/templates.md holds the table of the registry. `UPDATE_DOCS=1 pytest tests/llm/template` rewrites it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from swiftlite.families.templates import TEMPLATES
from swiftlite.llm.template.jinja import ChatTemplate
from swiftlite.llm.template.registered import source_of

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
    "glm4_7": "glm4_5, without line breaks, prompt opens a thought block",
}
HEAD = """# Chat templates

The chat template in a checkpoint's own directory writes what a model sees in training, at generation and in a preview:
the text that servers write from the same directory, character for character. Token ids are those of that text. Where its
answers lie is said by its `{% generation %}` tags; without tags it is found out by writing shorter and changed
conversations, and a row for which that cannot be settled is dropped and counted with the reason.

The templates below are for checkpoints without one, and for `--template NAME`. They are Jinja with generation tags, and
the checkpoint that is written gets the one that was trained as chat_template.jinja. Where each text comes from:

- **Jinja**: what the model's published chat template writes; tests compare with it, on fixed and random conversations.
- **sibling**: no chat template of its own is at hand; a sibling's, with its own default system message.
- **parts**: none is at hand; prefix, prompt, separator and suffix are joined round by round, as ms-swift does.

Training text is that text, plus what ends an answer where nothing is printed after the last one (GLM-4.5: `<|user|>`, or
`<|observation|>` after a tool call). Labels cover what follows the generation prompt in each assistant turn, and the first
end token after it. A thought block that the generation prompt already holds is not trained on.

Arguments of tool calls may be objects or JSON text in the data: they are given to the template in the form that it prints
as JSON (a template that prints an object with `tojson` would put a text in quotes, as no model writes it).

"""


def table() -> str:
    published: dict[str, list[str]] = {}
    for official_id in official.IDS:
        published.setdefault(official.template_type(official_id), []).append(official_id)
    lines = ["| template | text | thinking | tools |", "|---|---|---|---|"]

    for meta in TEMPLATES:
        name = meta.template_type
        if name in published:
            source = f"Jinja: {', '.join(published[name])}"
        elif name in SIBLINGS:
            source = f"sibling: {SIBLINGS[name]}"
        else:
            assert not meta.jinja, f"{name}: say in SIBLINGS where its text comes from"
            source = "parts"
        chat = ChatTemplate(None, source_of(meta), name, {}, ())
        tools = "yes" if chat.prints_tools() else "calls only" if chat.prints_calls() else ""
        thinking = "yes" if meta.template_cls == "ThinkingTemplate" else ""
        lines.append(f"| {name} | {source} | {thinking} | {tools} |")
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
