"""Streaming: blocks of any size give the same bytes, casts are torch's, budgets are kept or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swiftlite.utils.errors import BudgetError, CheckpointError
from swiftlite.weights import stream
from swiftlite.weights.ops import Segment
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Extent

A, B = torch.randn(12, 5), torch.randn(6, 5).bfloat16()
SEGMENTS = (Segment(1, 0, 3), Segment(0, 4, 8), Segment(1, 3, 3), Segment(0, 0, 4))


def job(tmp_path: Path, dtype: torch.dtype) -> stream.Job:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)

    def locate(index: int, start: int, stop: int) -> Iterator[Extent]:
        return source.extents("ab"[index], start, stop)

    out = tmp_path / "out"
    out.write_bytes(bytes(7 + 18 * 5 * dtype.itemsize))
    return stream.Job("t", ("a", "b"), SEGMENTS, 5, locate, (A.dtype, B.dtype), dtype, out, 7)


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
