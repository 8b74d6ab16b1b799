"""Collectives of two GPUs through each other's memory give what NCCL's give, one by one and in replayed graphs."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.multiprocessing as processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def _compare(rank: int, port: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    torch.cuda.set_device(rank)
    dist = torch.distributed
    dist.init_process_group("nccl", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    from swiftlite.megatron import peer_memory

    group, plain = dist.new_group([0, 1]), dist.new_group([0, 1])
    peer_memory.serve([group])
    generator = torch.Generator("cuda").manual_seed(rank)

    def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        part = torch.randn(rows, 512, device="cuda", generator=generator).to(dtype)
        return part, torch.randn(2 * rows, 512, device="cuda", generator=generator).to(dtype)

    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 16, 1000, 5000, 3):
            part, whole = inputs(rows, dtype)
            gathered, reduced = (torch.full_like(x, float("nan")) for x in (whole, part))
            wanted = torch.empty_like(whole), torch.empty_like(part)
            work = dist.all_gather_into_tensor(gathered, part, group=group, async_op=True)
            dist.reduce_scatter_tensor(reduced, whole, group=group)
            work.wait()
            dist.all_gather_into_tensor(wanted[0], part, group=plain)
            dist.reduce_scatter_tensor(wanted[1], whole, group=plain)
            assert torch.equal(gathered, wanted[0]) and torch.equal(reduced, wanted[1]), (dtype, rows)
    assert peer_memory._groups[group].room  # it was not NCCL that answered
    part, whole = inputs(2000, torch.bfloat16)
    outputs = [torch.empty_like(x) for x in (whole, part, whole)]

    def three(to: list[torch.Tensor], group: dist.ProcessGroup) -> None:
        """An odd number: the halves of the memory change their parts from replay to replay."""
        dist.all_gather_into_tensor(to[0], part, group=group)
        dist.reduce_scatter_tensor(to[1], whole + to[0], group=group)
        dist.all_gather_into_tensor(to[2], to[1], group=group)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        three(outputs, group)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            three(outputs, group)
        wanted = [torch.empty_like(x) for x in outputs]
        for _ in range(20):
            for mine, new in zip((part, whole), inputs(2000, torch.bfloat16), strict=True):
                mine.copy_(new)
            graph.replay()
            three(wanted, plain)
            assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    torch.cuda.synchronize()
    os._exit(0)


def test_they_equal_those_of_nccl() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("spawn")
    started = [context.Process(target=_compare, args=(rank, port)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(100)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in started] == [0, 0]
