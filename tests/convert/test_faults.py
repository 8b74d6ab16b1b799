"""docs/faults.md is what really happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.convert.fault_table import CASES, Case, Seen, document, make_scene, observe, tiny

DOCS = Path(__file__).parents[2] / "docs/faults.md"

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults").resolve()
    make_scene(root, tiny(root / "tiny"))
    return root


@pytest.fixture(scope="module")
def seen() -> list[tuple[Case, Seen]]:
    return []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(case: Case, root: Path, seen: list[tuple[Case, Seen]]) -> None:
    """Ends as it should, leaves no output that looks whole, and the same command afterwards gives the true result."""
    found = observe(case, root)
    seen.append((case, found))
    assert found.code == 0 or found.message != "(nothing)" or found.code == 137


def test_the_document_is_what_was_seen(seen: list[tuple[Case, Seen]]) -> None:
    if len(seen) < len(CASES):
        pytest.skip("some faults were not run")
    assert DOCS.read_text(encoding="utf-8") == document(seen)
