"""A step's forward and backward passes as one CUDA graph: captured once for each shape of its batches, then replayed.

Python starts a kernel in some ten microseconds, many kernels of a layer compute for less; a replay starts them all at
once. What is captured reads its batch where it was at capture time, so a replay copies the new batch there first.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor

from swiftlite.arguments.parallel import MegatronArguments
from swiftlite.megatron.model.blocks.gated_delta_net import kernel
from swiftlite.megatron.model.experts import counts_stay_on_device, implementation
from swiftlite.megatron.trainers.batch import MicroBatch
from swiftlite.utils.io import format_bytes
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Settings

logger = get_logger()

# The first steps compile kernels, choose algorithms and learn which gradients a bucket waits for.
WARM_UP = 2
# Each graph keeps the memory that its passes need, so data of many lengths stays without.
MOST_GRAPHS = 2

Shapes = tuple[tuple[tuple[str, torch.Size, torch.dtype], ...], ...]  # of each batch's tensors, by name
Passes = Callable[[list[MicroBatch]], Tensor]


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    batches: list[MicroBatch]
    names: list[list[str]]
    result: Tensor

    def replay(self, batches: list[MicroBatch]) -> Tensor:
        for mine, new, names in zip(self.batches, batches, self.names, strict=True):
            for name in names:
                getattr(mine, name).copy_(getattr(new, name), non_blocking=True)
        self.graph.replay()
        return self.result.clone()


class StepGraphs:
    """Runs passes, from the third time on that batches have the same shapes as a replay.

    obstacle: why nothing is captured, None: it is.
    """

    def __init__(self, obstacle: str | None) -> None:
        self.obstacle = obstacle
        self._seen: Counter[Shapes] = Counter()
        self._captured: dict[Shapes, _Captured] = {}
        self._pool: Any = None

    def run(self, batches: list[MicroBatch], passes: Passes) -> Tensor:
        """`passes(batches)`; batches are dataclasses of tensors. passes: reads nothing else that changes."""
        if self.obstacle is not None:
            return passes(batches)
        key = _shapes(batches)
        found = self._captured.get(key)
        if found is None:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP or len(self._captured) == MOST_GRAPHS:
                return passes(batches)
            found = self._capture(key, batches, passes)
            if found is None:
                return passes(batches)
        return found.replay(batches)

    def _capture(self, key: Shapes, batches: list[MicroBatch], passes: Passes) -> _Captured | None:
        static = [_copied(batch) for batch in batches]
        names = [list(_tensors(batch)) for batch in static]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        torch.cuda.empty_cache()  # the graph's memory is apart from what is cached for other work
        before = torch.cuda.mem_get_info()[0]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self._pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
            ), _one_generator():  # fmt: skip
                result = passes(static)
        except RuntimeError as error:  # out of memory is one too
            self.obstacle = f"capturing them failed ({str(error).strip().splitlines()[0]})"
            logger.warning("the passes of a step are not captured: %s", self.obstacle)
            del graph
            # The generator still believes that it is being captured; a copy of it does not.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())
            gc.collect()
            torch.cuda.empty_cache()
            return None
        used = format_bytes(before - torch.cuda.mem_get_info()[0])
        shape = "x".join(str(size) for size in static[0].tokens.shape)
        logger.info("captured the passes of a step, %d of %s tokens, as a CUDA graph of %s", len(static), shape, used)
        self._captured[key] = _Captured(graph, static, names, result)
        return self._captured[key]

    def describe(self, args: MegatronArguments, config: TransformerConfig) -> str:
        """How loss and experts are computed, and how the passes run."""
        loss = f"fused ({config.cross_entropy_fusion_impl})" if config.cross_entropy_loss_fusion else "plain"
        experts = f"; experts {implementation(args, config)}" if config.num_moe_experts else ""
        passes = f"eager ({self.obstacle})" if self.obstacle else "a CUDA graph from the third step of one shape on"
        return f"cross entropy {loss}{experts}; passes {passes}"

    def release(self) -> None:
        """Let the graphs' memory go."""
        self._captured.clear()


@contextmanager
def _one_generator() -> Iterator[None]:
    """Without dropout, sequence parallelism switches generators for nothing; a capture must not."""
    tracker = get_cuda_rng_tracker()
    tracker.fork = lambda *_, **__: nullcontext()
    try:
        yield
    finally:
        del tracker.fork


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def _copied(batch: MicroBatch) -> MicroBatch:
    tensors: Settings = {name: value.clone() for name, value in _tensors(batch).items()}
    return replace(batch, **tensors)


def _shapes(batches: list[MicroBatch]) -> Shapes:
    return tuple(tuple((n, t.shape, t.dtype) for n, t in _tensors(batch).items()) for batch in batches)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Work inside runs on a stream of its own: nothing that the default stream has seen can be captured later."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def obstacle(args: MegatronArguments, models: Sequence[MegatronModule], device: torch.device) -> str | None:
    """Why the passes of this run cannot be captured, None if they can."""
    config: TransformerConfig = get_model_config(models[0])
    dropout = config.attention_dropout or config.hidden_dropout
    reasons = {
        "the device is not a GPU": device.type != "cuda",
        "--cuda_graph false": args.cuda_graph is False,
        "recomputation sets the random generators": config.recompute_granularity is not None,
        "what is offloaded waits for the host": config.fine_grained_activation_offloading,
        "fp16 changes its loss scale": config.fp16,
        "context parallelism has not been tried with one": config.context_parallel_size > 1,
        "flash-linear-attention asks where packed samples end": (
            args.packing and config.linear_attention_freq is not None and kernel() is not None
        ),
        "dropout of divided layers has generators of its own": bool(dropout) or (
            config.tensor_model_parallel_size > 1 and args.train_type == "lora" and bool(args.lora_dropout)
        ) or (config.sequence_parallel and bool(args.neftune_noise_alpha)),
        "mismatched answers are batches of their own": getattr(args, "rlhf_type", None) == "kto",
        "groups have different numbers of texts": bool(getattr(args, "groups", False)),
        "the positions with labels differ": getattr(args, "rlhf_type", None) == "gkd",
        "a dispatcher waits for the experts' token counts": not counts_stay_on_device(models),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)
