"""What the README shows is true: its Python runs, its files and make targets exist. Its commands: test_docs.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


OWN_MODELS = (ROOT / "docs/own_models.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_files_and_targets_exist() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for line in "\n".join(blocks("bash")).splitlines():
        for part in line.split("#")[0].split("&&"):
            words = part.split()
            if words[:1] == ["make"]:
                for target in words[1:]:
                    assert re.search(rf"^{target}:", makefile, re.M), target
            if words[:1] == ["bash"]:
                assert (ROOT / words[1]).is_file()


def test_the_python_example_runs(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    code = blocks("python")[0].replace("path/to/model", str(tiny_model("glm4_moe")))
    # The tiny model holds 256 tokens and its answers have no end: a short one is enough here.
    code = code.replace('"Who are you?"])', '"Who are you?", "--max_new_tokens", "3"])')
    row = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Swifty."}]}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 16))
    script = tmp_path / "example.py"
    script.write_text(f'{code}\nif __name__ == "__main__":\n    print(sorted(row), "Swifty" in text)\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['input_ids', 'labels', 'length'] True"
    assert (tmp_path / "tuned" / "config.json").is_file() and (tmp_path / "run" / "logging.jsonl").is_file()


def test_registering_a_model_as_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from swiftlite import families
    from swiftlite.checkpoint.registry import get_matched_model_meta

    assert get_matched_model_meta("x/my-model-7b") is None
    families.families()
    monkeypatch.setattr(families, "_MODELS", dict(families._MODELS))
    exec(blocks("python", OWN_MODELS)[0], {})
    meta = get_matched_model_meta("x/my-model-7b")
    assert meta is not None and meta.model_type == "my_model"
