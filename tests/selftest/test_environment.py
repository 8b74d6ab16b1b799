"""`swiftlite env` says what is there, what is used, and what is missing with the line that installs it."""

from __future__ import annotations

import json
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from swiftlite.cli.main import main
from swiftlite.selftest import environment


def test_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json", "true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["machine"]["memory"].endswith(("GB", "TB"))
    assert ("none" in report["GPUs"]) != torch.cuda.is_available()
    assert report["disks"]["here"].endswith("/s")
    missing = {
        how for _, module, _, how in environment.PACKAGES if module != "megatron.core" and not util.find_spec(module)
    }
    assert missing <= set(report["missing"].values())


def test_what_is_missing_is_told_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = environment._is_there
    monkeypatch.setattr(environment, "_is_there", lambda module: module != "megatron.core" and there(module))
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "no: megatron-core is not installed" in text and "pip install 'swiftlite[megatron]'" in text
    assert "https://hub.example" in text and "megatron-core  " not in text.split("missing")[0]


def test_every_extra_is_known_with_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    del extras["dev"]  # for tests
    lines = {(distribution, how) for distribution, _, _, how in environment.PACKAGES}
    for extra, requirements in extras.items():
        names = {Requirement(requirement).name for requirement in requirements}
        found = {name for name in names for distribution, how in lines if distribution == name and f"[{extra}]'" in how}
        assert found == names, extra
    monkeypatch.setattr(environment, "_is_there", lambda module: module in ("torch", "fastapi", "openai"))
    assert main(["env", "--json", "true"]) == 0
    missing = json.loads(capsys.readouterr().out)["missing"]
    assert (
        missing["deploy without vLLM or SGLang"] == "pip install 'swiftlite[serve]'"
    )  # uvicorn and a newer transformers
    assert missing["eval --metrics rouge"] == "pip install 'swiftlite[eval]'"
    assert missing["plot --html"] == "pip install 'swiftlite[html]'"
    assert missing["make docs, in the source tree"] == "pip install -e '.[docs]'"


def test_a_module_of_a_package_that_is_not_there() -> None:
    assert not environment._is_there("no_such_package.module")
    assert environment._is_there("json.decoder")
