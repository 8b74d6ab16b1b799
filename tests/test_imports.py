"""Imports go one way, megatron.core stays where it belongs, and importing swiftlite is cheap."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import swiftlite
from swiftlite.moved import MOVED

PACKAGE = Path(swiftlite.__file__).parent
# A room may import those before it, and itself.
LAYERS = ("utils", "weights", "families", "arguments", "checkpoint", "convert", "plan", "train", "llm", "megatron",
          "selftest", "cli")  # fmt: skip
# Where megatron-core may be imported.
MCORE = ("megatron", "selftest")
HEAVY = ("torch", "transformers", "megatron.core", "datasets", "modelscope", "trl", "peft", "pyarrow")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, inside functions too; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 30
    assert {f.relative_to(PACKAGE).parts[0] for f in FILES} >= set(LAYERS)
    assert "swiftlite.families.records" in imports_of(PACKAGE / "families" / "llama.py")


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_import_only_what_is_below_them(layer: str) -> None:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    found: dict[str, set[str]] = {}
    for path in (PACKAGE / layer).rglob("*.py"):
        rooms = {module.split(".")[1] for module in imports_of(path) if module.startswith("swiftlite.")}
        if rooms.intersection(above):
            found[str(path.relative_to(PACKAGE))] = rooms.intersection(above)
    assert found == {}


MOST_OWN_MODULES = 16
OWN = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def own_modules_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions too; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in OWN:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in OWN else str(node.module) for name in names}
    return found


def test_no_module_imports_from_many_others() -> None:
    """Whoever needs more has several subjects."""
    counts = {str(path.relative_to(PACKAGE)): len(own_modules_of(path)) for path in FILES}
    assert counts["checkpoint/tensors.py"] > 10  # it does count
    assert {name: count for name, count in counts.items() if count > MOST_OWN_MODULES} == {}


def test_megatron_core_is_imported_only_where_live_models_are() -> None:
    wrong = []
    for path in FILES:
        allowed = path.relative_to(PACKAGE).parts[0] in MCORE
        for module in imports_of(path):
            if module.startswith("megatron.training"):
                wrong.append(f"{path}: {module} is not in the megatron-core package")
            elif (module == "megatron" or module.startswith("megatron.")) and not allowed:
                wrong.append(f"{path}: {module}")
    assert not wrong, "; ".join(wrong)


def test_the_engine_knows_neither_transformers_nor_process_groups() -> None:
    for layer in ("weights", "utils"):
        for path in (PACKAGE / layer).rglob("*.py"):
            bad = [m for m in imports_of(path) if m.split(".")[0] in ("transformers", "megatron", "peft", "trl")]
            assert not bad, f"{path}: {bad}"


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a new process has loaded after running `code`."""
    script = f"{code}\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    return set(done.stdout.split())


def test_importing_swiftlite_loads_nothing_heavy() -> None:
    assert loaded_after("import swiftlite; dir(swiftlite)") == set()
    assert loaded_after("import swiftlite.cli.main, swiftlite.checkpoint.registry") == set()
    assert "torch" in loaded_after("import torch")  # the check itself sees what it looks for


def test_offline_export_needs_torch_only() -> None:
    assert loaded_after("import swiftlite.cli.export") <= {"torch"}


@pytest.mark.parametrize("name", [n for n in swiftlite.__all__ if n != "__version__"])
def test_public_names_are_there_and_documented(name: str) -> None:
    assert (getattr(swiftlite, name).__doc__ or "").strip(), name


def test_unknown_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'get_tokenizer'; it has .*get_model_tokenizer"):
        _ = swiftlite.get_tokenizer  # type: ignore[attr-defined]


@pytest.mark.parametrize("old", MOVED)
def test_old_module_names_give_the_new_modules(old: str) -> None:
    with pytest.warns(DeprecationWarning, match="now"):
        sys.modules.pop(old, None)
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    assert module is new and new.__spec__ is not None and new.__spec__.name == MOVED[old] == new.__name__
    used = [path for path in FILES if old in imports_of(path)]
    assert not used, f"{old} is imported by {used}"
