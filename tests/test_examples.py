"""Each file of examples/ is short, is accepted as it stands, and trains a tiny model when given one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from swiftlite.arguments.parser import parse, split_argv
from swiftlite.cli.launcher import _free_port
from swiftlite.cli.main import find_route, main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
TRAINING_SCRIPTS = ("multi_node.sh", "resume_elsewhere.sh")
MODEL_AND_DATA = {"model", "dataset"}
# Example -> the kind of tiny model that stands in for its model, and that model's type.
STAND_INS = {
    "classify.yaml": ("qwen2", "qwen2_5"),
    "dpo.yaml": ("qwen2", "qwen2_5"),
    "kto.yaml": ("qwen2", "qwen2_5"),
    "lora.yaml": ("qwen2", "qwen2_5"),
    "megatron_dense.yaml": ("qwen2", "qwen2_5"),
    "megatron_dpo_lora.yaml": ("qwen3_moe", "qwen3_moe"),
    "megatron_lora_moe.yaml": ("qwen3_moe", "qwen3_moe"),
    "multi_node.sh": ("qwen3_moe", "qwen3_moe"),
    "resume_elsewhere.sh": ("qwen2", "qwen2_5"),
    "reward.yaml": ("qwen2", "qwen2_5"),
}


def words_of(config: Path) -> list[str]:
    """The command that the file's comment gives, without environment variables and `swiftlite`."""
    found = re.search(rf"^#   (?:\w+=\w+ )*swiftlite (.* examples/{re.escape(config.name)})$", config.read_text(), re.M)
    assert found, f"{config.name} does not say how it is started"
    return found[1].split()


def script_words(script: str) -> list[str]:
    """What a script hands to swiftlite, shell variables as they are written."""
    text = (ROOT / "examples" / script).read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "-m swiftlite" in line)
    return [word for word in shlex.split(line.partition("-m swiftlite")[2]) if word != "$@"]


def tiny(name: str, tiny_model: Callable[..., Path], output: Path, **flags: Any) -> list[str]:
    family, model_type = STAND_INS[name]
    settings = {
        "model": tiny_model(family), "model_type": model_type, "torch_dtype": "float32", "max_length": 200,
        "micro_batch_size": 1, "global_batch_size": 2, "train_iters": 2, "output_dir": output, "report_to": "none",
        **flags,
    }  # fmt: skip
    return [word for flag, value in settings.items() for word in (f"--{flag}", str(value))]


def log_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "logging.jsonl").read_text().splitlines()]


def test_every_example_has_a_stand_in() -> None:
    assert {config.name for config in CONFIGS} | set(TRAINING_SCRIPTS) == set(STAND_INS)
    scripts = {path.name for path in (ROOT / "examples").glob("*.sh")}
    assert scripts == {*TRAINING_SCRIPTS, "quickstart.sh", "both_sides.sh"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_is_short_and_accepted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, route, rest = find_route(words_of(config))
    module, _, name = route.arguments.partition(":")
    args = parse(getattr(importlib.import_module(module), name), rest)
    settings = yaml.safe_load(config.read_text())
    assert len(set(settings) - MODEL_AND_DATA) <= 10
    assert all(Path(path).is_file() for path in args.dataset)


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_script_is_short(script: str) -> None:
    _, _, rest = find_route(script_words(script))
    _, flags = split_argv(rest)
    assert len(set(flags) - MODEL_AND_DATA) <= 10


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_trains(
    config: Path, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    flags: dict[str, Any] = {}
    if "parallel_size" in config.read_text():  # this is one process
        flags = {name: 1 for name in yaml.safe_load(config.read_text()) if name.endswith("parallel_size")}
        flags["sequence_parallel"] = "false"
    assert main([*words_of(config), *tiny(config.name, tiny_model, tmp_path / "run", **flags)]) == 0
    assert log_of(tmp_path / "run")[-1]["step"] == 2


def start(script: str, words: list[str], **environment: str) -> subprocess.Popen[str]:
    variables: Mapping[str, str] = {
        **os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment
    }  # fmt: skip
    command = ["bash", str(ROOT / "examples" / script), *words]
    return subprocess.Popen(command, env=variables, text=True, stderr=subprocess.STDOUT, stdout=subprocess.PIPE)


@pytest.mark.dist
def test_a_run_on_two_machines(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Two launchers with one process each stand in for them."""
    words = tiny("multi_node.sh", tiny_model, tmp_path / "run", expert_model_parallel_size=1)
    common = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    nodes = [start("multi_node.sh", words, NODE_RANK=str(rank), **common) for rank in range(2)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert log_of(tmp_path / "run")[-1]["step"] == 2
    assert "PP 2" in said[0]


@pytest.mark.dist
def test_a_stopped_run_goes_on_under_another_layout(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    output, steps = tmp_path / "run", 100
    words = tiny("resume_elsewhere.sh", tiny_model, output, train_iters=steps, save_steps=20, logging_steps=1)
    run = start("resume_elsewhere.sh", words, OUTPUT=str(output))
    said = run.communicate(timeout=500)[0]
    assert run.returncode == 0, said[-3000:]
    stopped = re.search(r"stopped after step (\d+)", said)
    assert stopped and 20 <= int(stopped[1]) < steps, said[-3000:]
    assert "TP 2" in said and "PP 2" in said and f"resuming from step {stopped[1]}" in said
    assert [line["step"] for line in log_of(output)] == list(range(1, steps + 1))
    losses = [line["loss"] for line in log_of(output)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_both_sides_of_a_tiny_model(tmp_path: Path) -> None:
    make = [sys.executable, "examples/make_tiny_model.py", str(tmp_path / "model"), "--corpus"]
    subprocess.run([*make, "examples/data/self_cognition.jsonl"], cwd=ROOT, check=True)
    words = ["bash", "examples/both_sides.sh", str(tmp_path / "model"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== answers ") == 5 and done.stdout.count(" -> ") == 20
    assert (tmp_path / "out/lora.png").is_file() and (tmp_path / "out/dpo.png").is_file()
    again = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exists already" in again.stderr
