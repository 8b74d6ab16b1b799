"""torch_dist files against torch's own reader and writer, any division into chunks, and damaged ones."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from swiftlite.utils.directories import find_iteration
from swiftlite.utils.errors import CheckpointError
from swiftlite.weights.dcp_file import TorchDistSource, create_files, load_common, write_metadata
from swiftlite.weights.ops import CONCAT, COPY
from swiftlite.weights.rule import Source, WeightMap, WeightRule
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import Files, byte_view, read_tensor
from swiftlite.weights.torch_dist import HfNames, McoreView, plan_torch_dist
from swiftlite.weights.torch_record import data_offset

MODEL = ModelShape(
    num_layers=2, hidden=6, vocab=9, heads=2, groups=1, head_dim=3, ffn=8, moe_layers=(True, True), experts=3, moe_ffn=4
)
MAP = WeightMap(
    top=(WeightRule("embedding.weight", (Source("emb", ("vocab", "hidden")),)),),
    layer=(
        WeightRule("{layer}.norm.weight", (Source("{layer}.norm", ("hidden",)),), COPY),
        WeightRule(
            "{layer}.mlp.experts.experts.linear_fc1.weight",
            (
                Source("{layer}.e.{expert}.gate", ("moe_ffn", "hidden")),
                Source("{layer}.e.{expert}.up", ("moe_ffn", "hidden")),
            ),
            CONCAT,
        ),
    ),
).bind(MODEL)


def write(directory: Path, num_files: int = 2) -> dict[tuple[str, int | None], torch.Tensor]:
    plan = plan_torch_dist([[(e, torch.bfloat16)] for e in MAP.entries], num_files)
    create_files(directory, plan)
    tensors = {}
    with Files() as files:
        for entry in MAP.entries:
            tensors[entry.mcore, entry.expert] = tensor = torch.randn(entry.shape).bfloat16()
            file, offset = plan.data[entry.mcore, entry.expert]
            files.write(directory / file, offset, byte_view(tensor))
    write_metadata(directory, plan, {"num_layers": 2, "tensor_model_parallel_size": 1}, 1)
    return tensors


@pytest.mark.parametrize("num_files", [1, 2, 5])
def test_torch_reads_what_we_write(tmp_path: Path, num_files: int) -> None:
    tensors = write(tmp_path, num_files)
    assert len(list(tmp_path.glob("*.distcp"))) == num_files
    metadata = FileSystemReader(tmp_path).read_metadata()
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in metadata.state_dict_metadata.items()}
    dcp.load(state, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert state["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].shape == (3, 8, 6)
    for (name, expert), tensor in tensors.items():
        assert torch.equal(state[name] if expert is None else state[name][expert], tensor)


def test_common_state_loads_without_running_code(tmp_path: Path) -> None:
    write(tmp_path)
    state = torch.load(tmp_path / "common.pt", weights_only=True)
    assert state["args"].num_layers == 2 and state["args"]["num_layers"] == 2 and state["iteration"] == 1
    assert load_common(tmp_path)["checkpoint_version"] == 3.0


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    state = {"x": torch.randn(5, 3), "y": torch.arange(4), "z": torch.tensor(1.5), "w": torch.randn(4, 6)[:, ::2]}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    source = TorchDistSource(tmp_path)
    with Files() as files:
        for name in ("x", "y", "z"):
            assert torch.equal(read_tensor(source, name, files), state[name])
        assert torch.equal(read_tensor(source, "w", files), state["w"])


def test_hugging_face_names_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = write(tmp_path)
    names = HfNames(McoreView.open(TorchDistSource(tmp_path), MAP))
    assert set(names.names) == set(MAP.by_hf)
    with Files() as files:
        for layer, expert in ((0, 0), (1, 2)):
            fused = tensors[f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight", expert]
            prefix = f"model.layers.{layer}.e.{expert}"
            assert torch.equal(read_tensor(names, f"{prefix}.gate", files), fused[:4])
            assert torch.equal(read_tensor(names, f"{prefix}.up", files, rows=(1, 3)), fused[5:7])


def _save_chunks(directory: Path, tensor: torch.Tensor, corners: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Write one tensor in the given chunks, one record each, as a live save over several ranks does."""
    chunks, storage, position = [], {}, 0
    with (directory / "__0_0.distcp").open("wb") as file:
        for corner, sizes in corners:
            part = tensor[tuple(slice(c, c + s) for c, s in zip(corner, sizes, strict=True))].contiguous()
            torch.save(part, file)  # keeps the whole storage where the part is a view
            length = file.tell() - position
            storage[MetadataIndex("t", corner)] = _StorageInfo("__0_0.distcp", position, length)
            chunks.append(ChunkStorageMetadata(torch.Size(corner), torch.Size(sizes)))
            position = file.tell()
    item = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    (directory / ".metadata").write_bytes(pickle.dumps(Metadata({"t": item}, {}, storage)))


@pytest.mark.parametrize(
    "corners",
    [
        [((0, 0), (6, 8))],
        [((0, 0), (3, 8)), ((3, 0), (3, 8))],
        [((0, 0), (6, 4)), ((0, 4), (6, 4))],
        [((r, c), (3, 4)) for r in (0, 3) for c in (0, 4)],
        [((0, 0), (1, 8)), ((1, 0), (5, 3)), ((1, 3), (5, 5))],
    ],
    ids=["whole", "rows", "columns", "grid", "irregular"],
)
def test_any_range_of_any_division(tmp_path: Path, corners: list) -> None:
    tensor = torch.randn(6, 8)
    _save_chunks(tmp_path, tensor, corners)
    source = TorchDistSource(tmp_path)
    with Files() as files:
        for start in range(0, 48, 5):
            for stop in range(start + 1, 49, 7):
                out = torch.empty(stop - start)
                files.read_into(byte_view(out), source.extents("t", start * 4, stop * 4))
                assert torch.equal(out, tensor.view(-1)[start:stop])


def test_missing_chunk(tmp_path: Path) -> None:
    _save_chunks(tmp_path, torch.randn(6, 8), [((0, 0), (3, 8))])
    with pytest.raises(CheckpointError, match="has 48 elements, its chunks 24; the checkpoint is incomplete"):
        TorchDistSource(tmp_path)


def test_truncated_data_file(tmp_path: Path) -> None:
    write(tmp_path, 1)
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-200])
    source = TorchDistSource(tmp_path)
    with pytest.raises(CheckpointError, match="damaged or truncated"), Files() as files:
        read_tensor(source, "decoder.layers.1.mlp.experts.experts.linear_fc1.weight", files)


def test_missing_data_file(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "__0_1.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_1.distcp is missing"):
        TorchDistSource(tmp_path)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # noqa: ANN204
            return (print, ("ran",))

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="refers to builtins.print"):
        TorchDistSource(tmp_path)


def test_find_iteration_says_what_a_directory_is(tmp_path: Path) -> None:
    iteration = tmp_path / "iter_0000007"
    iteration.mkdir()
    write(iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert find_iteration(tmp_path) == find_iteration(iteration) == iteration
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(CheckpointError, match="names iteration 8"):
        find_iteration(tmp_path)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").touch()
    (hf / "config.json").touch()
    with pytest.raises(
        CheckpointError, match="no Megatron checkpoint, this is a Hugging Face directory; give it with --model"
    ):
        find_iteration(hf)
    with pytest.raises(CheckpointError, match="none: no such directory; check the path"):
        find_iteration(tmp_path / "none")


@pytest.mark.parametrize("start", [0, -1, -3, 4, 2**31 - 1])
def test_a_record_is_read_within_its_own_bytes(start: int, tmp_path: Path) -> None:
    """A description that begins elsewhere would give bytes of a neighbour, or of the file's own headers."""
    buffer = io.BytesIO()
    torch.save(torch.arange(8, dtype=torch.float32), buffer)
    file = tmp_path / "__0_0.distcp"
    with zipfile.ZipFile(buffer) as archive, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"QK\0") == 1  # the storage, then where the tensor begins in it
                content = content.replace(b"QK\0", b"QJ" + start.to_bytes(4, "little", signed=True))
            changed.writestr(name, content)
    size = file.stat().st_size
    if start:
        with pytest.raises(CheckpointError, match="record at 0 holds 32 bytes"):
            data_offset(file, 0, size, 32)
    else:
        found = data_offset(file, 0, size, 32)
        assert file.read_bytes()[found : found + 32] == torch.arange(8, dtype=torch.float32).numpy().tobytes()
