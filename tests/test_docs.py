"""The documentation is true: links lead somewhere, commands parse and run, generated pages are what the code says."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import swiftlite
from swiftlite.arguments.parser import parse
from swiftlite.cli.main import find_route, main
from swiftlite.selftest import environment
from tests.browser import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FILES = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
         ROOT / "benchmarks/README.md", ROOT / "benchmarks/gpu/README.md"]  # fmt: skip
# Pages that mkdocs makes.
MADE = {"messages.md"}


def tool(name: str) -> ModuleType:
    """docs/NAME.py"""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(file: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(file: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(file.read_text(encoding="utf-8"))):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or name in MADE:
            continue
        there = (file.parent / name).resolve() if name else file
        assert there.exists(), f"{file.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{file.name}: {target}"


def test_the_table_of_objectives_is_what_the_commands_say() -> None:
    made, text = tool("make_objectives"), (DOCS / "objectives.md").read_text(encoding="utf-8")
    assert text == made.written(text), "run python docs/make_objectives.py"


def test_every_page_is_in_the_menu() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def names(entry: object) -> list[str]:
        inside = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
        return [entry] if isinstance(entry, str) else [name for item in inside for name in names(item)]

    elsewhere = set(tool("site_hooks").ELSEWHERE.values())
    assert sorted(names(config["nav"])) == sorted({page.name for page in PAGES} | elsewhere | MADE)


def commands(file: Path) -> list[tuple[dict[str, str], list[str]]]:
    """(variables before it, words) of each `swiftlite` line in the shell blocks and indented blocks of a page."""
    text = file.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"(?:^    .*\n)+", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True) if "swiftlite " in line else []
        variables = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        if words[:1] == ["swiftlite"] and not {"COMMAND", "..."} & set(words):
            found.append((variables, words[1:]))
    return found


ALL = [(file.name, words) for file in FILES for _, words in commands(file)]


@pytest.mark.parametrize("page, words", ALL, ids=[f"{page}: {' '.join(words)}"[:100] for page, words in ALL])
def test_commands_parse(page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: DIR\ndataset: [a.jsonl]\n")
    _, route, rest = find_route(words)
    module, _, name = route.arguments.partition(":")
    parse(getattr(importlib.import_module(module), name), rest)


def test_there_are_commands_to_check() -> None:
    assert len(ALL) > 50


# Small and short, whatever the page says; said last, so that they count.
TINY = {
    "train": "--train_iters 2 --micro_batch_size 1 --global_batch_size 2 --max_length 128 --report_to none "
    "--torch_dtype float32",
    "check": "--train_iters 2",
    "infer": "--max_new_tokens 2",
}  # fmt: skip


def run_page(page: str) -> None:
    """Run a page's commands one after the other; those for several processes or machines have tests of their own."""
    for variables, words in commands(DOCS / page):
        if variables or "completion" in words:
            continue
        kind = "train" if {"sft", "pt", "dpo"} & set(words[:2]) else words[0]
        extra = TINY.get(kind, "").split()
        if kind == "check" and "--parity" not in words:
            extra = []
        if "--extend" in words:
            extra = [*extra[2:]]
        assert main([*words, *extra]) == 0, f"{page}: swiftlite {' '.join([*words, *extra])}"


@pytest.mark.slow
def test_commands_of_the_first_pages_run(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quickstart, convert and train in one directory, as somebody would who reads them in this order."""
    shutil.copytree(tiny_model("glm4_moe"), tmp_path / "MODEL")
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]} for i in range(8)
    ]
    pairs = [{**row, "rejected_response": "no"} for row in rows]
    texts = [{"text": f"{i} is a number."} for i in range(80)]
    for name, data in (("train", rows), ("pairs", pairs), ("text", texts)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)))
    monkeypatch.chdir(tmp_path)
    for page in ("quickstart.md", "convert.md", "train.md"):
        run_page(page)
    for written in ("MODEL-mcore", "MODEL-back", "merged", "adapter-mcore", "MODEL-fp8", "full/checkpoint-2",
                    "megatron/iter_0000002", "tuned/config.json", "runs.png"):  # fmt: skip
        assert (tmp_path / written).exists(), written


def test_environment_variables_are_described() -> None:
    make = tool("make_environment")
    described = {name for variables in make.GROUPS.values() for name in variables}
    read = make.names_in_code()
    assert read - described == set(), "describe them in docs/make_environment.py"
    assert set(make.GROUPS["Read by libraries, shown by `swiftlite env`"]) <= set(environment.VARIABLES)
    assert described - read == set(), "no code has these any more"
    assert (DOCS / "environment.md").read_text(encoding="utf-8") == make.page()


def test_troubleshooting_quotes_real_messages() -> None:
    texts = [message.text for message in tool("make_messages").messages()]
    assert len(texts) > 400
    for quoted in re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(), re.M):
        assert any(quoted in text for text in texts), quoted


def test_the_list_of_messages_has_errors_as_people_see_them(capsys: pytest.CaptureFixture[str]) -> None:
    page = tool("make_messages").page()
    for words in (["sft", "--model", "DIR"], ["export", "--to_hf", "true"], ["plot"]):
        assert main(words) == 2
        said = capsys.readouterr().err.removeprefix("swiftlite: error: ").strip()
        assert said.replace("`", "'") in page


def test_the_python_page_has_every_public_name() -> None:
    text = tool("make_python").reference()
    for name in (*swiftlite.__all__, "train", "Run", "convert"):
        assert name == "__version__" or f"### {name}\n" in text
    assert "- `history`:" in text and "**Returns**" in text


def test_links_of_the_site() -> None:
    links = tool("site_hooks").with_site_links
    assert (
        links("[a](../CONTRIBUTING.md), [b](data.md#x)", "docs/architecture.md")
        == "[a](contributing.md), [b](data.md#x)"
    )
    assert links("[a](gpu/README.md)", "benchmarks/README.md") == "[a](gpu.md)"
    assert links("[a](../examples/lora.yaml) `[b](c)`", "docs/data.md") == "a (`examples/lora.yaml`) `[b](c)`"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    target = tmp_path_factory.mktemp("docs") / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(target)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:  # nothing is fetched from elsewhere
        assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?https?:""", page.read_text()), page


@pytest.mark.slow
def test_the_site_fits_a_phone(site: Path, page: Page) -> None:
    for name in ("index", "quickstart", "flags", "migration", "messages", "benchmarks", "models", "objectives"):
        page.open(site / f"{name}.html", width=390)
        assert page.value("document.documentElement.scrollWidth") == 390, name
    assert page.errors == [] and {address.split(":")[0] for address in page.requests} == {"file", "data"}


def test_flags_and_sentences_have_marks_for_the_style_sheet() -> None:
    marked = tool("site_hooks").on_page_content
    code = '<code><span class="flag">--num_<wbr>labels</span> 2</code>'
    assert marked("<code>--num_labels 2</code>") == code
    assert marked("<pre><code>--num_labels 2</code></pre>") == "<pre><code>--num_labels 2</code></pre>"
    table = "<table><td>{}</td><td>2</td></table>"
    assert marked(table.format("few")) == table.format("few")
    assert marked(table.format(61 * "x")) == f'<div class="sentences">{table.format(61 * "x")}</div>'
