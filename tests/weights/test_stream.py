"""Streaming: blocks of any size give the same bytes, casts are torch's, budgets are kept or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from swiftlite.convert.hf import copy_job
from swiftlite.utils.errors import BudgetError, CheckpointError
from swiftlite.weights import stream
from swiftlite.weights.ops import Segment
from swiftlite.weights.safetensors import SafetensorsSource, create_shards, plan_shards
from swiftlite.weights.storage import TensorSpec

A, B = torch.randn(12, 5), torch.randn(6, 5).bfloat16()
SEGMENTS = (Segment(1, 0, 3), Segment(0, 4, 8), Segment(1, 3, 3), Segment(0, 0, 4))


def job(tmp_path: Path, dtype: torch.dtype) -> stream.Job:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    out = tmp_path / "out"
    out.write_bytes(bytes(7 + 18 * 5 * dtype.itemsize))
    return stream.Job("t", ("a", "b"), SEGMENTS, 5, source, dtype, out, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", [None, 60, 100, 1000])
def test_gather_and_cast(tmp_path: Path, dtype: torch.dtype, budget: int | None) -> None:
    work = job(tmp_path, dtype)
    seen: list[int] = []
    stream.run([work], max_memory=budget, on_bytes=seen.append)
    expected = torch.cat([t[s.start : s.start + s.size].to(dtype) for s in SEGMENTS for t in ((A, B)[s.source],)])
    written = torch.frombuffer(bytearray(work.file.read_bytes()[7:]), dtype=dtype).reshape(18, 5)
    assert torch.equal(written, expected)
    assert sum(seen) == work.nbytes == 18 * 5 * dtype.itemsize
    assert work.file.read_bytes()[:7] == bytes(7)


def test_budget_smaller_than_a_row_is_refused_before_writing(tmp_path: Path) -> None:
    work = job(tmp_path, torch.float32)
    with pytest.raises(BudgetError, match="too small: one row of a tensor takes"):
        stream.run([work], max_memory=59)
    assert work.file.read_bytes() == bytes(7 + 18 * 20)


def test_a_failing_read_stops_the_run(tmp_path: Path) -> None:
    work = job(tmp_path, torch.float32)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends at byte"):
        stream.run([work])


def test_tensors_without_rows_and_without_dimensions(tmp_path: Path) -> None:
    """[0, 4], [4, 0] and [] keep name, shape, dtype and bytes, also when they are cast."""
    tensors = {"none": torch.empty(0, 4), "narrow": torch.empty(4, 0), "scalar": torch.tensor(2.5), "a": A}
    save_file(tensors, tmp_path / "model.safetensors")
    source, out = SafetensorsSource(tmp_path), tmp_path / "out"
    out.mkdir()
    for dtype in (torch.float32, torch.bfloat16):
        (plan,) = plan_shards({n: TensorSpec(dtype, tuple(t.shape)) for n, t in tensors.items()}, 10**9)
        create_shards(out, [plan])
        digests = stream.run(
            [copy_job(source, n, out / plan.file, offset, dtype) for n, offset in plan.offsets.items()]
        )
        assert set(digests) == set(tensors)
        for name, tensor in load_file(out / plan.file).items():
            assert tensor.dtype == dtype and torch.equal(tensor, tensors[name].to(dtype))
