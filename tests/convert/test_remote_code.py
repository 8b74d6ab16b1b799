"""Code that a checkpoint brings along: never run unasked, and with --trust_remote_code true it is the reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swiftlite.llm.model import reference
from tests.families.cases import build_hf, config_of

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
from transformers import Qwen2Config

class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""
MODELING = """
import os
from pathlib import Path
from transformers import Qwen2ForCausalLM
from .configuration_mimo import MiMoConfig

Path(os.environ["MARKER"]).write_text("run")

class MiMoForCausalLM(Qwen2ForCausalLM):
    config_class = MiMoConfig

    def __init__(self, config):
        super().__init__(config)
        FAULT
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MiMo with its code next to it, as on the hub."""
    directory = tmp_path_factory.mktemp("mimo") / "hf"
    reference.register()
    build_hf(config_of("mimo:default"), directory)
    (directory / "configuration_mimo.py").write_text(CONFIGURATION)
    (directory / "modeling_mimo.py").write_text(MODELING.replace("FAULT", ""))
    config = json.loads((directory / "config.json").read_text())
    names = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    (directory / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    return directory


def swiftlite(marker: Path, *words: str) -> tuple[int, str, bool]:
    """Exit code, stderr, whether the checkpoint's code ran. In its own process: modules and registries are global."""
    environment = {**os.environ, "MARKER": str(marker), "HF_MODULES_CACHE": str(marker.parent / "modules")}
    run = subprocess.run(
        [sys.executable, "-m", "swiftlite", *words], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    return run.returncode, run.stderr, marker.exists()


def export(checkpoint: Path, tmp_path: Path, *words: str) -> tuple[int, str, bool]:
    flags = ("--model_type", "mimo", "--to_mcore", "true", "--test_convert_precision", "true", *words)
    return swiftlite(
        tmp_path / "marker", "export", "--model", str(checkpoint), "--output_dir", str(tmp_path / "mcore"), *flags
    )


def test_never_unasked(checkpoint: Path, tmp_path: Path) -> None:
    code, stderr, ran = export(checkpoint, tmp_path)
    assert code == 0 and not ran, stderr
    assert (tmp_path / "mcore/modeling_mimo.py").read_text() == (checkpoint / "modeling_mimo.py").read_text()


def test_used_when_trusted(checkpoint: Path, tmp_path: Path) -> None:
    code, stderr, ran = export(checkpoint, tmp_path, "--trust_remote_code", "true")
    assert code == 0 and ran, stderr
    code, stderr, ran = swiftlite(
        tmp_path / "marker2", "check", "--model", str(checkpoint), "--trust_remote_code", "true"
    )
    assert code == 0 and ran, stderr


def test_its_word_counts(checkpoint: Path, tmp_path: Path) -> None:
    """Code that computes something else than the map says fails the command."""
    other = tmp_path / "hf"
    other.mkdir()
    for file in checkpoint.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    fault = "self.model.layers[1].mlp.act_fn = __import__('torch').nn.GELU()"
    (other / "modeling_mimo.py").write_text(MODELING.replace("FAULT", fault))
    code, stderr, ran = export(other, tmp_path, "--trust_remote_code", "true")
    assert code == 1 and ran and "layer 1" in stderr
    assert not (tmp_path / "mcore").exists()
