"""What is installed: the wheel's and sdist's files, their metadata, the quickstart from a wheel, the Dockerfiles."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "swiftlite"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with wheel and sdist, built from a copy of the tree by the installed setuptools, without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "output", "runs", "build", "dist", "golden")
    shutil.copytree(ROOT, source, dirs_exist_ok=True, ignore=left_out)
    code = f"from setuptools import build_meta as b; b.build_wheel({str(target)!r}); b.build_sdist({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return target


def wheel_of(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(built: Path) -> Message:
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        return message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))


def test_the_wheel_holds_the_package_and_its_data(built: Path) -> None:
    there = {str(p.relative_to(ROOT)) for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == there
    for data in ("py.typed", "families/catalogue.jsonl", "families/tiny_configs.json"):
        assert f"swiftlite/{data}" in packed
    assert any(name.endswith(".jinja") for name in packed)


def test_the_sdist_holds_what_the_quickstart_and_the_tests_need(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in ("examples/quickstart.sh", "examples/data/self_cognition.jsonl", "tests/constraints.txt", "LICENSE",
                 "tests/conftest.py", "docs/data.md", "swiftlite/families/catalogue.jsonl", "pyproject.toml"):  # fmt: skip
        assert name in names


def test_metadata(metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    classifiers = metadata.get_all("Classifier") or []
    assert "Operating System :: POSIX" in classifiers and "Typing :: Typed" in classifiers
    text = metadata.get_payload()
    assert isinstance(text, str) and "# swiftlite" in text
    # PyPI shows no other files: no relative link is left.
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))] == []
    extras = set(metadata.get_all("Provides-Extra") or [])
    for file in [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *PACKAGE.rglob("*.py"),
        *map(ROOT.joinpath, DOCKERFILES),
    ]:
        for named in re.findall(r"(?:'swiftlite|'\.|\"/src)\[([a-z,]+)\]", file.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, f"{file.name}: [{named}]"


@pytest.mark.slow
def test_the_quickstart_runs_from_the_wheel_outside_the_repository(built: Path, tmp_path: Path) -> None:
    """A new environment with the wheel; the dependencies are this interpreter's, after it on the path."""
    home, work = tmp_path / "venv", tmp_path / "work"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin/python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel_of(built))], check=True)
    packages = next((home / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # no .pth file of theirs is read
    shutil.copytree(ROOT / "examples", work / "examples")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.run([str(python), "-c", "import swiftlite; print(swiftlite.__file__)"], cwd=work, text=True,
                           env=environment, capture_output=True, check=True).stdout  # fmt: skip
    assert where.startswith(str(home))
    done = subprocess.run(["bash", "examples/quickstart.sh", "--tiny"], cwd=work, text=True, capture_output=True,
                          env={**environment, "PYTHON": str(python)}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (work / "output/quickstart-tiny/hf/config.json").is_file()
    script = [str(home / "bin/swiftlite"), "completion", "bash"]
    assert "_swiftlite" in subprocess.run(script, cwd=work, text=True, capture_output=True, env=environment).stdout


def instructions(name: str) -> list[tuple[str, str]]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined.splitlines() if line.strip()]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles(name: str) -> None:
    """What hadolint asks for, and that the versions are those that the tests pass with."""
    found = instructions(name)
    assert {word for word, _ in found} <= {"FROM", "RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert re.fullmatch(r"[\w/.-]+:[\w.-]*\d[\w.-]*", found[0][1]) and found[0][0] == "FROM"
    assert [text for word, text in found if word == "USER"][-1].isdigit()  # Kubernetes sees that it is not root
    ignored = (ROOT / ".dockerignore").read_text().split()
    versions = set()
    for word, text in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", text], check=True)
            assert "sudo" not in text and ("apt-get install" not in text or "--no-install-recommends" in text)
            assert "apt-get update" not in text or "rm -rf /var/lib/apt/lists/*" in text
            versions |= set(re.findall(r"\btorch==([\d.]+)", text))
        if word == "COPY":
            for source in text.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored
    pinned = {
        file: set(re.findall(r"torch==([\d.]+)", (ROOT / file).read_text()))
        for file in ("Makefile", "examples/quickstart.sh")
    }
    assert all(versions == those for those in pinned.values())
    installs = [text for word, text in found if word == "RUN" and '"/src[' in text]
    assert len(installs) == 1 and "-c /tmp/constraints.txt" in installs[0]
