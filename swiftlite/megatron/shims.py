"""Bridges over gaps of megatron-core: the table of shims, and the functions that it names.

Nothing happens at import; `backend.setup()` applies those that the machine needs.
"""

from __future__ import annotations

import contextvars
import importlib
import importlib.util
import inspect
import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from swiftlite.megatron import cpu
from swiftlite.utils.types import Settings
from swiftlite.weights.unpickle import guard_checkpoint_reader


@dataclass(frozen=True)
class Shim:
    """A bridge over a gap of megatron-core.

    versions: releases that need it. needed: condition on the machine ('cpu', 'te', 'no_te', 'always').
    gone: how to know that it can be deleted.
    """

    name: str
    versions: str
    needed: str
    reason: str
    gone: str
    apply: Callable[[], None]


def _router_without_te() -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _mla_without_te() -> None:
    mla = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    if not isinstance(getattr(mla, "TELinear", None), type):
        mla.HAVE_TE = False  # type: ignore[attr-defined]


def _split_sizes_as_lists() -> None:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, Tensor):
            return tensor.numpy()
        return tensor

    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    original = mappings._AllToAll.forward

    def forward(
        ctx: Any, group: ProcessGroup, tokens: Tensor, output_splits: Any, input_splits: Any, *rest: Any
    ) -> Tensor:
        def plain(sizes: Any) -> list[int] | None:
            return None if sizes is None else [int(n) for n in sizes]

        return original(ctx, group, tokens, plain(output_splits), plain(input_splits), *rest)  # type: ignore[no-any-return]

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]
    mappings._AllToAll.forward = staticmethod(forward)


def _uneven_parts_over_gloo() -> None:
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(
        input_: Tensor, group: ProcessGroup, output_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)  # type: ignore[no-any-return]
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_parts(
        input_: Tensor, group: ProcessGroup, input_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, *args, **kwargs)  # type: ignore[no-any-return]
        total = input_.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        start = sum(input_split_sizes[: group.rank()])
        return total[start : start + input_split_sizes[group.rank()]].contiguous()

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_parts


def _keep_adam_step() -> None:
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: Any, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        original(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states


def _keep_bucket_padding() -> None:
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer

    def get_parameter_state(self: Any, empty_data: bool = False, **_: object) -> dict[object, object]:
        """{buffer number: {dtypes: {state: [numel of the buffer] fp32}}}, on every rank of the data-parallel group."""
        group = self.data_parallel_group
        state: dict[object, object] = {"buckets_coalesced": True}
        for number, ranges in enumerate(self.gbuf_ranges):
            ((dtypes, bucket_ranges),) = ranges.items()
            buffer = self.buffers[number]
            world = {key: torch.zeros(buffer.numel) for key in ("param", "exp_avg", "exp_avg_sq")}
            for bucket, bucket_range in zip(buffer.buckets, bucket_ranges, strict=True):
                if empty_data:
                    break
                size = bucket.grad_data.numel()
                for key, whole in world.items():
                    shard = torch.zeros(size // group.size(), device=bucket.grad_data.device)
                    for param, places in bucket_range["param_map"].items():
                        place = places["gbuf_local"]
                        shard[place.start : place.end] = self._get_main_param_and_optimizer_states(param)[key].detach()
                    parts = [torch.empty_like(shard) for _ in range(group.size())]
                    torch.distributed.all_gather(parts, shard, group=group)
                    whole[bucket.offset : bucket.offset + size] = torch.cat(parts).cpu()
            state[number] = {dtypes: {**world, "numel_unpadded": buffer.numel_unpadded}}
        return state

    optimizer.get_parameter_state_dp_zero = get_parameter_state


def _collect_writes_in_process() -> None:
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    writer._results_queue = queue.Queue()  # type: ignore[attr-defined]


def _norm_recompute_without_te() -> None:
    checkpoint: Any = importlib.import_module("megatron.core.tensor_parallel.random").CheckpointWithoutOutput
    original = checkpoint.__init__

    def init(self: Any, fp8: object = None, **kwargs: Any) -> None:
        original(self, fp8=fp8 or None, **kwargs)

    checkpoint.__init__ = init


def _recompute_in_context() -> None:
    function: Any = importlib.import_module("megatron.core.tensor_parallel.random").CheckpointFunction
    original = function.forward

    def forward(ctx: Any, run_function: Callable[..., Any], distribute: bool, *args: Any) -> Any:
        context = contextvars.copy_context()

        def run(*inputs: Any) -> Any:
            return context.run(run_function, *inputs)

        return original(ctx, run, distribute, *args)

    function.forward = staticmethod(forward)


def _recompute_in_context_in_fp8() -> None:
    engine = importlib.import_module("transformer_engine.pytorch.distributed")
    original = engine.checkpoint

    def checkpoint(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        context = contextvars.copy_context()
        found: object = original(lambda *inputs, **named: context.run(function, *inputs, **named), *args, **kwargs)
        return found

    engine.checkpoint = checkpoint  # type: ignore[attr-defined]


def _gates_of_shared_groups() -> None:
    attention: Any = importlib.import_module("megatron.core.transformer.attention").Attention
    original = attention._apply_output_gate
    attention._apply_output_gate = lambda self, x, gate: original(
        self, x, gate.chunk(ranks := gate.numel() // x.numel(), 2)[self.pg_collection.tp.rank() % ranks]
    )


def _plain_q_projection() -> None:
    if importlib.util.find_spec("megatron.core.transformer.mla_qk_norm_config") is None:
        return
    resolver = importlib.import_module("megatron.core.transformer.mla_qk_norm_config").QKNormConfigResolver
    original = resolver._mla_fused_linear_or_default

    def linear(self: Any, spec: Any, name: str) -> Any:
        return spec or self.linear_impl if name == "linear_q_proj" else original(self, spec, name)

    resolver._mla_fused_linear_or_default = linear


def _cross_entropy_in_place() -> None:
    kernels = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    language: Any = importlib.import_module("megatron.core.models.common.language_module.language_module")
    if "overwrite_input" not in inspect.signature(kernels.parallel_cross_entropy).parameters:
        return
    original = language.te_parallel_cross_entropy

    def cross_entropy(logits: Tensor, labels: Tensor, group: ProcessGroup, *args: Any) -> Any:
        if not (logits.requires_grad and logits.is_contiguous()):
            return original(logits, labels, group, *args)
        return kernels.parallel_cross_entropy(logits, labels, dist_process_group=group, overwrite_input=True)

    language.te_parallel_cross_entropy = cross_entropy


def _hybrid_optimizer() -> Any:
    module = importlib.import_module("megatron.core.optimizer.cpu_offloading.hybrid_optimizer")
    return module.HybridDeviceOptimizer


def _allocate_without_stepping() -> None:
    hybrid = _hybrid_optimizer()

    def allocate(self: torch.optim.Optimizer) -> None:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.decoupled_grad = torch.zeros_like(parameter)
        self.step()
        self.zero_grad()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate

    hybrid.dummy_step = allocate


def _no_version_of_te() -> None:
    config = importlib.import_module("megatron.core.optimizer.optimizer_config")
    config.is_te_min_version = lambda *_, **__: False  # type: ignore[attr-defined]


def _offload_on_cpu() -> None:
    def divide(self: Any, fraction: float) -> tuple[object, ...]:
        """As megatron-core divides what is on a GPU: main weights of the first parameters are `copies`, all are fp32."""
        whole = sum(p.numel() for group in self.param_groups for p in group["params"])
        offloaded: list[Settings] = []
        others: list[Settings] = []
        copies: dict[Tensor, Tensor] = {}
        main: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            here: tuple[list[Tensor], list[Tensor]] = ([], [])
            for parameter in group["params"]:
                main[parameter] = parameter.detach().clone().float()
                moves = sum(p.numel() for p in copies) < whole * fraction
                if moves:
                    copies[parameter] = main[parameter]
                here[not moves].append(main[parameter])
            for part, found in zip((offloaded, others), here, strict=True):
                part += [{**group, "params": found}] if found else []
        return offloaded, others, copies, {copy: p for p, copy in copies.items()}, main

    _hybrid_optimizer()._get_sub_optimizer_param_groups = divide


SHIMS = (
    Shim(
        "allocate_without_stepping",
        "0.16-0.19",
        "always",
        "before the hybrid optimizer loads its states, it makes them by a step with random gradients, which moves the "
        "random generators",
        "HybridDeviceOptimizer.dummy_step takes no random numbers",
        _allocate_without_stepping,
    ),
    Shim(
        "no_version_of_te",
        "0.16-0.19",
        "no_te",
        "the config of an offloaded optimizer compares the version of Transformer Engine, which is None",
        "--optimizer_cpu_offload true trains without Transformer Engine and without it",
        _no_version_of_te,
    ),
    Shim(
        "offload_on_cpu",
        "0.16-0.19",
        "cpu",
        "the hybrid optimizer offloads what is on a GPU and has no gradients for what is not",
        "--optimizer_cpu_offload true trains on a CPU without it",
        _offload_on_cpu,
    ),
    Shim(
        "cross_entropy_in_place",
        "0.16-0.19",
        "te",
        "Transformer Engine's cross entropy keeps a copy of the logits, the largest tensor of a step, unless it is told "
        "that it may write their gradient over them; nobody reads them afterwards",
        "megatron-core passes overwrite_input",
        _cross_entropy_in_place,
    ),
    Shim(
        "guarded_pickles",
        "0.16-0.19",
        "always",
        "torch.distributed.checkpoint unpickles .metadata and the objects in .distcp files (RNG states) as they come, "
        "so that a checkpoint of somebody else could run code",
        "FileSystemReader.read_metadata refuses a pickle that names os.system",
        guard_checkpoint_reader,
    ),
    Shim(
        "no_compile",
        "0.16-0.19",
        "cpu",
        "jit_fuser is torch.compile, which needs a C++ compiler on a CPU and takes longer than a small run",
        "megatron.core.jit can be switched off before its users are imported",
        cpu.run_uncompiled,
    ),
    Shim(
        "gates_of_shared_groups",
        "0.16",
        "always",
        "where TP ranks share a key/value head, each takes its own of the head's queries but the gates of all of them",
        "a model with gated attention trains on more TP ranks than it has key/value heads without it",
        _gates_of_shared_groups,
    ),
    Shim(
        "plain_q_projection",
        "0.19",
        "always",
        "with latent norms on, megatron-core puts a norm before linear_q_proj of models without q_lora_rank (Moonlight, "
        "DeepSeek-V2-Lite), which have none there; without Transformer Engine it has no such layer and refuses",
        "a Moonlight model builds without it, and has no self_attention.linear_q_proj.layer_norm_weight",
        _plain_q_projection,
    ),
    Shim(
        "cpu_for_cuda",
        "0.16-0.19",
        "cpu",
        "megatron-core asks torch.cuda for its device, streams and generators and names 'cuda' in factories and in "
        "type checks of the optimizer and of gradient clipping",
        "a GPTModel trains one step on a CPU build of torch without it",
        cpu.use_cpu_for_cuda,
    ),
    Shim(
        "tensor_cuda",
        "0.16-0.19",
        "cpu",
        "the second copy of tied embeddings (last pipeline stage) is moved with Tensor.cuda()",
        "a tied model builds with two pipeline stages on a CPU without it",
        cpu.tensor_cuda_is_identity,
    ),
    Shim(
        "te_general_gemm",
        "0.16.x",
        "no_te",
        "moe_utils reads te_general_gemm, which its import guard forgets to define without Transformer Engine",
        "an MoE forward runs without Transformer Engine and without it",
        _router_without_te,
    ),
    Shim(
        "mla_have_te",
        "0.16.x",
        "no_te",
        "multi_latent_attention calls isinstance(x, TELinear) with TELinear None",
        "an MLA layer builds without Transformer Engine and without it",
        _mla_without_te,
    ),
    Shim(
        "split_sizes",
        "0.16-0.19",
        "cpu",
        "the all-to-all dispatcher turns split sizes into plain numbers only when they are CUDA tensors; gloo wants lists",
        "the alltoall dispatcher runs with two expert-parallel CPU processes without it",
        _split_sizes_as_lists,
    ),
    Shim(
        "uneven_parts",
        "0.16-0.19",
        "cpu",
        "experts that TP ranks share gather different numbers of tokens from each rank; gloo knows equal parts only",
        "expert_tensor_parallel_size 2 trains on CPU processes without it",
        _uneven_parts_over_gloo,
    ),
    Shim(
        "adam_step",
        "0.16-0.19",
        "no_te",
        "loading optimizer states looks for torch Adam's step among the tensors, and lets all parameters share one step "
        "tensor, which then counts every parameter's update",
        "a run resumes without Transformer Engine and without it",
        _keep_adam_step,
    ),
    Shim(
        "bucket_padding",
        "0.16-0.19",
        "always",
        "fully_reshardable optimizer states are cut out at positions that count the padding between buckets, of a tensor "
        "that has none: with several buckets (tied embeddings over pipeline stages, overlapped reduction) a checkpoint "
        "holds shifted states",
        "a tied model saved from two pipeline stages resumes in one without it",
        _keep_bucket_padding,
    ),
    Shim(
        "norm_recompute",
        "0.16-0.19",
        "no_te",
        "recomputation of norms takes 'no FP8' for FP8 and looks for Transformer Engine's FP8 state",
        "--recompute_modules layernorm trains without Transformer Engine and without it",
        _norm_recompute_without_te,
    ),
    Shim(
        "recompute_context",
        "0.16-0.19",
        "always",
        "what is recomputed in the backward pass runs outside of the context of its forward pass, when other micro batches "
        "have been run: routers would look at the wrong one's padding (blocks/router.py)",
        "megatron-core hands a micro batch's padding and sequences to every router, MTP's too",
        _recompute_in_context,
    ),
    Shim(
        "recompute_context_in_fp8",
        "0.16-0.19",
        "te",
        "the same of what Transformer Engine recomputes, in FP8",
        "as above",
        _recompute_in_context_in_fp8,
    ),
    Shim(
        "results_queue",
        "0.16-0.19",
        "always",
        "saving starts a manager process for results that, in synchronous saving, never leave this process; it takes "
        "seconds to start and outlives a run that is killed. Asynchronous saving here passes them through a file",
        "saving leaves no process behind (multiprocessing.active_children)",
        _collect_writes_in_process,
    ),
)
