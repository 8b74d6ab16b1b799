"""`swiftlite verify` over formats, and what it says of differences."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.cli.main import main


@pytest.fixture
def pair(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    model = Path(shutil.copytree(tiny_model("glm4_moe"), tmp_path / "GLM-4.5-Air"))
    assert main(["export", "--model", str(model), "--to_mcore", "true", "--output_dir", str(tmp_path / "mcore")]) == 0
    return model, tmp_path / "mcore"


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_equal_across_formats(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model, mcore = map(str, pair)
    assert main(["verify", model, mcore]) == main(["verify", mcore, model]) == 0
    assert main(["verify", model, mcore, "--quick", "true"]) == main(["verify", model, model]) == 0


@pytest.mark.parametrize("quick", ["false", "true"])
def test_the_first_difference_is_named(pair: tuple[Path, Path], quick: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    edit(pair[0], lambda t: t[name][3, 4].add_(1e-3))
    assert main(["verify", *map(str, pair), "--quick", quick]) == 1
    assert f"{name} differs between" in capsys.readouterr().err


def test_dtype_and_usage(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "half"
    flags = ["--torch_dtype", "float16", "--output_dir", str(other)]
    assert main(["export", "--model", str(pair[0]), "--to_mcore", "true", *flags]) == 0
    assert main(["verify", str(pair[1]), str(other)]) == 1
    assert "float16" in capsys.readouterr().err
    assert main(["verify", str(pair[1])]) == 2
    assert "swiftlite verify DIR_A DIR_B" in capsys.readouterr().err
