"""Reading and writing safetensors files, against the safetensors library, and what damaged files get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.utils.errors import CheckpointError
from swiftlite.weights.safetensors import INDEX, SafetensorsSource, create_shards, plan_shards, read_header, write_index
from swiftlite.weights.storage import Files, byte_view, read_tensor

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "empty": torch.empty(0, 4),
    "ints": torch.arange(6, dtype=torch.int64).reshape(2, 3),
    "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
}


def write(directory: Path, max_bytes: int) -> None:
    shards = plan_shards({n: read_spec(t) for n, t in TENSORS.items()}, max_bytes)
    create_shards(directory, shards)
    with Files() as files:
        for shard in shards:
            for name, offset in shard.offsets.items():
                files.write(directory / shard.file, offset, byte_view(TENSORS[name]))
    write_index(directory, shards, sum(t.nbytes for t in TENSORS.values()))


def read_spec(tensor: torch.Tensor):  # noqa: ANN201
    from swiftlite.weights.storage import TensorSpec

    return TensorSpec(tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("max_bytes", [10**9, 40, 1])
def test_files_load_with_the_safetensors_library(tmp_path: Path, max_bytes: int) -> None:
    write(tmp_path, max_bytes)
    loaded: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        loaded |= load_file(file)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert byte_view(loaded[name]) == byte_view(tensor)
    assert (tmp_path / INDEX).exists() == (max_bytes < 10**9)


def test_reads_what_the_safetensors_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    with Files() as files:
        for name, tensor in TENSORS.items():
            got = read_tensor(source, name, files)
            assert got.dtype == tensor.dtype and got.shape == tensor.shape
            assert byte_view(got) == byte_view(tensor)
        assert torch.equal(read_tensor(source, "a", files, rows=(1, 3)), TENSORS["a"][1:3])


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"", b"not json", b"[1]", b'{"a": 1}', b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    ],
)  # fmt: skip
def test_damaged_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


def test_oversized_header_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="header length"):
        read_header(path)


def test_index_that_lies(tmp_path: Path) -> None:
    write(tmp_path, 40)
    index = json.loads((tmp_path / INDEX).read_text())
    good = index["weight_map"]
    for bad, message in (
        ({**good, "ghost": good["a"]}, "says ghost is in"),
        ({**good, "a": "gone.safetensors"}, "lists gone.safetensors, which is not there"),
        ({**good, "a": "../a.safetensors"}, "outside the model directory"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": bad}))
        with pytest.raises(CheckpointError, match=message):
            SafetensorsSource(tmp_path)


def test_tensor_stored_twice(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="stored twice"):
        SafetensorsSource(tmp_path)


def test_directory_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="convert it to safetensors first"):
        SafetensorsSource(tmp_path)
