"""Writes docs/template_cases.md: template x case, text and token ids compared to the official chat templates.

    python docs/make_template_cases.py [TOKENIZERS]

TOKENIZERS: a folder of real tokenizers (NAME/tokenizer.json each). Without it the table of ids stays as it is.
"""

from __future__ import annotations

import sys
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "llm" / "template"))
import official  # noqa: E402

from swiftlite.llm.template import Template, get_template  # noqa: E402
from swiftlite.utils.errors import TemplateError  # noqa: E402

FILE = ROOT / "docs" / "template_cases.md"
IDS_TITLE = "## Token ids"
# Official template -> real tokenizers with its special tokens, by the folder's name.
TOKENIZERS = {
    "qwen2": "qwen2_5", "qwen2_5": "qwen2_5", "qwq": "qwq", "qwen3": "qwen3", "qwen3__rev1": "qwen3",
    "qwen3_instruct_2507": "qwen3", "marco_o1": "qwen2_5", "deepseek": "deepseek", "numina": "deepseek",
    "deepseek_r1": "deepseek_r1", "glm4_5": "glm4_5", "llama3": "llama3", "llama3_1": "llama3", "llama": "llama2",
}  # fmt: skip
GROUPS = {
    "no system": lambda name, c: not c.get("tools") and "think" not in name and c["messages"][0]["role"] != "system",
    "system": lambda name, c: not c.get("tools") and "think" not in name and c["messages"][0]["role"] == "system",
    "tools": lambda name, c: bool(c.get("tools")) and "think" not in name,
    "thoughts": lambda name, c: "think" in name,
}
HEAD = """# Template by case

Written by `python docs/make_template_cases.py`; a test compares the first table with what the code does now.

Each number counts renderings of fixed conversations, with and without generation prompt, thinking not said, on and off:
**equal** to the official Jinja / **unsupported** by the Jinja, which refuses the conversation / **different**.

Conversations with null contents are left out of the second table: transformers 5 changes them before the Jinja sees them.

## Text
"""
IDS_HEAD = """
Ids of the rendered text compared to `tokenizer.apply_chat_template(tokenize=True)` with the official Jinja, with real
tokenizers. Conversations with null contents are left out: transformers 5 changes them before the Jinja sees them.

"""


def cases(group: str) -> list[tuple[dict[str, Any], bool, dict[str, Any]]]:
    chosen = [c for name, c in official.CONVERSATIONS.items() if GROUPS[group](name, c)]
    options = ({}, {"enable_thinking": True}, {"enable_thinking": False})
    return list(product(chosen, (False, True), options))


def registered(official_id: str) -> Template:
    return get_template(official.template_type(official_id), SimpleNamespace(**official.special_tokens(official_id)))


def own(official_id: str) -> Template:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), **official.special_tokens(official_id)
    )
    tokenizer.chat_template = official.jinja_text(official_id)
    return get_template(official.template_type(official_id), tokenizer, template_backend="jinja")


def text_row(official_id: str, template: Template) -> dict[str, Counter[str]]:
    row = {}
    for group in GROUPS:
        row[group] = Counter()
        for conversation, generation, options in cases(group):
            arguments = (conversation["messages"], conversation.get("tools"), generation)
            if template.chat.is_own and any(message.get("content") is None for message in conversation["messages"]):
                continue
            wanted = official.render(official_id, *arguments, **options)
            if wanted is None:
                row[group]["unsupported"] += 1
                continue
            try:
                written = template.chat.write(*arguments, options)
            except TemplateError:
                written = None
            row[group]["equal" if written == wanted else "different"] += 1
    return row


def ids_row(official_id: str, tokenizer: Any) -> dict[str, Counter[str]]:
    tokenizer.chat_template = official.jinja_text(official_id)
    template = get_template(official.template_type(official_id), tokenizer)
    row = {}
    for group in GROUPS:
        row[group] = Counter()
        for conversation, generation, options in cases(group):
            messages, tools = conversation["messages"], conversation.get("tools")
            if any(message.get("content") is None for message in messages):
                continue
            try:
                wanted = tokenizer.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=generation, return_dict=False, **options
                )
            except Exception:
                row[group]["unsupported"] += 1
                continue
            ids = template.tokenize(template.render(messages, tools, generation, **options))
            row[group]["equal" if ids == list(wanted) else "different"] += 1
    return row


def table(rows: dict[str, dict[str, Counter[str]]]) -> str:
    lines = [f"| official template | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 1) + "|"]
    for name, row in rows.items():
        cells = (f"{c['equal']} / {c['unsupported']} / {c['different']}" for c in (row[g] for g in GROUPS))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def text_part() -> str:
    parts = [HEAD]
    for title, make in (("Registered templates", registered), ("The checkpoint's own", own)):
        parts.append(f"### {title}\n\n{table({name: text_row(name, make(name)) for name in official.IDS})}")
    return "\n".join(parts)


def main() -> None:
    old = FILE.read_text(encoding="utf-8") if FILE.is_file() else ""
    ids = old[old.index(IDS_TITLE) :] if IDS_TITLE in old else ""
    if len(sys.argv) > 1:
        from transformers import PreTrainedTokenizerFast

        rows = {}
        for name, folder in TOKENIZERS.items():
            directory = Path(sys.argv[1]) / folder
            if (directory / "tokenizer.json").is_file():
                rows[f"{name}, tokenizer {folder}"] = ids_row(name, PreTrainedTokenizerFast.from_pretrained(directory))
        ids = IDS_TITLE + "\n" + IDS_HEAD + table(rows)
    FILE.write_text(text_part() + "\n" + ids, encoding="utf-8")


if __name__ == "__main__":
    main()
