"""What pyproject.toml calls dynamic: version, the README as PyPI shows it, the project's addresses."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# Address of the repository's files in a browser, like https://HOST/ORG/swiftlite/blob/main. Forks put theirs here.
FILES = ""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def readme() -> str:
    """PyPI has no other files: links into the repository get its address, or stay as text while it has none."""
    to = rf"[\1]({FILES}/\2)" if FILES else r"\1"
    return re.sub(r"(?<!!)\[([^]]+)\]\((?!https?://|#)([^)]+)\)", to, read("README.md"))


addresses = {
    "Source": FILES.partition("/blob/")[0],
    "Changelog": f"{FILES}/CHANGELOG.md",
    "Documentation": f"{FILES}/docs",
}
setup(
    version=re.search(r'^__version__ = "(.+)"', read("swiftlite/__init__.py"), re.M)[1],
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls=addresses if FILES else {},
)
