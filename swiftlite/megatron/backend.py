"""What megatron-core runs on: the only file that reads versions, CUDA and Transformer Engine.

It owns the device, the collectives, the choice of layer spec, the layers that the local spec lacks, the on-disk names of
the local spec and the table of shims. Nothing happens at import; `setup()` does everything, once per process.

Shapes: S sequence, B batch, N heads, G key/value heads, D head width, T packed tokens.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import queue
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swiftlite.utils import io
from swiftlite.utils.dist import get_local_rank
from swiftlite.utils.errors import ConfigError, SwiftliteError
from swiftlite.utils.logger import get_logger
from swiftlite.weights.unpickle import guard_checkpoint_reader

logger = get_logger()

TESTED_CORE = ((0, 16), (0, 20))  # first tested release, first untested one


@dataclass(frozen=True)
class Backend:
    """What was found on this machine. `spec` is 'te' or 'local', `collectives` 'nccl' or 'gloo'."""

    device: torch.device
    collectives: str
    spec: str
    core_version: str
    shims: tuple[str, ...]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def attention(self) -> str:
        """The attention kernel that a forward pass runs, in words."""
        if self.spec == "te":
            return "Transformer Engine"
        return "torch SDPA (causal)"

    def describe(self) -> str:
        """One line for the start of a run."""
        return (
            f"device {self.device}, collectives {self.collectives}, megatron-core {self.core_version}, "
            f"{self.spec} spec, attention {self.attention}"
        )


# --------------------------------------------------------------------------------------------------------------------
# Shims


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


# Modules that a training run uses; a shim that rewrites modules must find all of them loaded.
_CORE_MODULES = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.transformer.multi_token_prediction",
    "megatron.core.transformer.multi_latent_attention",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.tensor_parallel.random",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.async_utils",
)


def _core_modules() -> list[types.ModuleType]:
    for name in _CORE_MODULES:
        importlib.import_module(name)
    return [m for name, m in sorted(sys.modules.items()) if name.startswith("megatron.core") and m is not None]


class _NullStream:
    """Stands for CUDA streams and events: on a CPU everything is already in order."""

    def record_event(self, *_: Any) -> _NullStream:
        return self

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


class _CpuForCuda:
    """The part of `torch.cuda` that megatron-core uses, carried out on the CPU; the rest is torch's own."""

    _stream = _NullStream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 0

    def Stream(self, *_: Any, **__: Any) -> _NullStream:  # noqa: N802 (torch's name)
        return self._stream

    Event = Stream

    def current_stream(self, *_: Any) -> _NullStream:
        return self._stream

    default_stream = current_stream

    def stream(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _nothing(self, *_: Any, **__: Any) -> None:
        return None

    synchronize = empty_cache = set_device = _nothing

    def memory_allocated(self, *_: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = memory_allocated

    def is_current_stream_capturing(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    nvtx = types.SimpleNamespace(range_push=lambda *_: None, range_pop=lambda *_: None)
    random = types.SimpleNamespace(get_rng_state=lambda *_, **__: torch.get_rng_state())


class _TorchOnCpu(types.ModuleType):
    """`torch` as the modules of megatron-core see it on a CPU: only the name `cuda` differs."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__["cuda"] = _CpuForCuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        self.__dict__[name] = value
        return value


_CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


def _retarget_constant(value: Any) -> Any:
    if isinstance(value, str):
        return _CPU_NAMES.get(value, value)
    if isinstance(value, tuple):
        return tuple(_retarget_constant(v) for v in value)
    if isinstance(value, types.CodeType):
        constants = tuple(_retarget_constant(c) for c in value.co_consts)
        return value if constants == value.co_consts else value.replace(co_consts=constants)
    return value


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Every function that `module` defines, also methods and what decorators wrapped."""

    def unwrap(obj: Any) -> Iterator[types.FunctionType]:
        if isinstance(obj, staticmethod | classmethod):
            obj = obj.__func__
        if isinstance(obj, property):
            for part in (obj.fget, obj.fset):
                yield from unwrap(part)
        while obj is not None:
            if isinstance(obj, types.FunctionType) and obj.__module__ == module.__name__:
                yield obj
            obj = getattr(obj, "__wrapped__", None) if not isinstance(obj, type) else None

    for obj in list(vars(module).values()):
        if isinstance(obj, type) and obj.__module__ == module.__name__:
            for member in list(vars(obj).values()):
                yield from unwrap(member)
        else:
            yield from unwrap(obj)


def _use_cpu_for_cuda() -> None:
    stand_in = _TorchOnCpu()
    for module in _core_modules():
        if getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]
        for function in _functions(module):
            function.__code__ = _retarget_constant(function.__code__)
            if function.__defaults__:
                function.__defaults__ = _retarget_constant(function.__defaults__)
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]
    # The tracker warns when the CPU generator moves inside a fork; here that is the generator it tracks.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _tensor_cuda_is_identity() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _run_uncompiled() -> None:
    for module in _core_modules():
        for name, value in list(vars(module).items()):
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if original is not None and not isinstance(value, type):
                setattr(module, name, original)
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for key, member in list(vars(value).items()):
                    original = getattr(member, "_torchdynamo_orig_callable", None)
                    if original is not None:
                        setattr(value, key, original)


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

    def forward(ctx: Any, group: Any, tokens: Tensor, output_splits: Any, input_splits: Any, *rest: Any) -> Tensor:
        def plain(sizes: Any) -> list[int] | None:
            return None if sizes is None else [int(n) for n in sizes]

        return original(ctx, group, tokens, plain(output_splits), plain(input_splits), *rest)  # type: ignore[no-any-return]

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]
    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]
    mappings._AllToAll.forward = staticmethod(forward)


def _uneven_parts_over_gloo() -> None:
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(input_: Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)  # type: ignore[no-any-return]
        longest = max(output_split_sizes)
        padded = input_.new_zeros(longest, *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_parts(input_: Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Tensor:
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

    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        original(self, model_param, tensors)

    optimizer._set_main_param_and_optimizer_states = set_states


def _keep_bucket_padding() -> None:
    optimizer = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer

    def get_parameter_state(self: Any, empty_data: bool = False, **_: Any) -> dict[Any, Any]:
        """{buffer number: {dtypes: {state: [numel of the buffer] fp32}}}, on every rank of the data-parallel group."""
        group = self.data_parallel_group
        state: dict[Any, Any] = {"buckets_coalesced": True}
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


class _ResultsFile:
    """A queue of one item that passes from a forked process to its parent, however large the item is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, item: Any) -> None:
        self._path.write_bytes(pickle.dumps(item))

    def get_nowait(self) -> Any:
        item = pickle.loads(self._path.read_bytes())
        self._path.unlink()
        return item

    get = get_nowait


def async_save_options() -> dict[str, Any]:
    """For dist_checkpointing.save: megatron-core's own requests; 0.19 asks for those of another package by default."""
    save = importlib.import_module("megatron.core.dist_checkpointing").save
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


@contextlib.contextmanager
def results_in_file(path: Path) -> Iterator[None]:
    """Saves that are planned inside tell their results through a file: another process writes them."""
    writer: Any = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    usual, writer._results_queue = writer._results_queue, _ResultsFile(path)
    try:
        yield
    finally:
        writer._results_queue = usual


def _norm_recompute_without_te() -> None:
    checkpoint: Any = importlib.import_module("megatron.core.tensor_parallel.random").CheckpointWithoutOutput
    original = checkpoint.__init__

    def init(self: Any, fp8: Any = None, **kwargs: Any) -> None:
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

    def cross_entropy(logits: Tensor, labels: Tensor, group: Any, *args: Any) -> Any:
        if not (logits.requires_grad and logits.is_contiguous()):
            return original(logits, labels, group, *args)
        return kernels.parallel_cross_entropy(logits, labels, dist_process_group=group, overwrite_input=True)

    language.te_parallel_cross_entropy = cross_entropy


SHIMS = (
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
        _use_cpu_for_cuda,
    ),
    Shim(
        "tensor_cuda",
        "0.16-0.19",
        "cpu",
        "the second copy of tied embeddings (last pipeline stage) is moved with Tensor.cuda()",
        "a tied model builds with two pipeline stages on a CPU without it",
        _tensor_cuda_is_identity,
    ),
    Shim(
        "no_compile",
        "0.16-0.19",
        "cpu",
        "jit_fuser is torch.compile, which needs a C++ compiler on a CPU and takes longer than a small run",
        "megatron.core.jit can be switched off before its users are imported",
        _run_uncompiled,
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
        "results_queue",
        "0.16-0.19",
        "always",
        "saving starts a manager process for results that, in synchronous saving, never leave this process; it takes "
        "seconds to start and outlives a run that is killed. Asynchronous saving here passes them through a file",
        "saving leaves no process behind (multiprocessing.active_children)",
        _collect_writes_in_process,
    ),
)


def _has_transformer_engine() -> bool:
    """True if Transformer Engine can be imported; a broken installation is reported, not hidden."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("Transformer Engine is installed but cannot be imported (%s); using the local spec.", error)
        return False
    return True


@functools.cache
def setup() -> Backend:
    """Find the device, bridge what this megatron-core needs there, and say what was found. Runs once per process.

    Raises: SwiftliteError if megatron-core is missing.
    """
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        raise SwiftliteError("megatron-core is not installed; run: pip install 'swiftlite[megatron]'")
    with warnings.catch_warnings():
        # Apex and Transformer Engine are optional here; the start banner says what is used instead.
        warnings.simplefilter("ignore")
        core = importlib.import_module("megatron.core")
        _core_modules()
    version = core.__version__
    release = tuple(int(part) for part in version.split(".")[:2])
    if not TESTED_CORE[0] <= release < TESTED_CORE[1]:
        logger.warning("megatron-core %s is outside the tested range 0.16 to 0.19", version)

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(get_local_rank() % torch.cuda.device_count())
    use_te = on_cuda and _has_transformer_engine()
    situation = {"cpu": not on_cuda, "te": use_te, "no_te": not use_te, "always": True}
    applied = [shim for shim in SHIMS if situation[shim.needed]]
    for shim in applied:
        shim.apply()
    return Backend(
        device=torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu"),
        collectives="nccl" if on_cuda else "gloo",
        spec="te" if use_te else "local",
        core_version=version,
        shims=tuple(shim.name for shim in applied),
    )


# --------------------------------------------------------------------------------------------------------------------
# Config fields that depend on the machine


@dataclass(frozen=True)
class Adjustment:
    """`field` becomes `value` in a situation ('cpu', 'local', 'no_wgrad_kernel'), because of `reason`."""

    field: str
    value: Any
    when: str
    reason: str


ADJUSTMENTS = (
    Adjustment("use_cpu_initialization", True, "cpu", "there is no other device"),
    Adjustment("moe_shared_expert_overlap", False, "cpu", "overlap needs CUDA streams"),
    Adjustment("deallocate_pipeline_outputs", False, "cpu", "gloo reads what is sent until it arrives"),
    Adjustment("tp_comm_overlap", False, "local", "needs Transformer Engine"),
    Adjustment("moe_grouped_gemm", False, "local", "grouped experts need Transformer Engine"),
    Adjustment("moe_permute_fusion", False, "local", "needs Transformer Engine kernels"),
    Adjustment("apply_rope_fusion", False, "local", "needs Transformer Engine kernels"),
    Adjustment("masked_softmax_fusion", False, "local", "SDPA computes the softmax"),
    Adjustment("persist_layer_norm", False, "local", "a kernel choice of Apex"),
    Adjustment("bias_activation_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("bias_dropout_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("cross_entropy_loss_fusion", False, "cpu", "the fused form pays only when compiled"),
    Adjustment("gradient_accumulation_fusion", False, "no_wgrad_kernel", "needs Apex's weight gradient kernel"),
)

# What a config holds with Transformer Engine where the arguments leave it open: the same numbers, sooner.
TE_DEFAULTS = {
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "batch_p2p_sync": False,  # a way around a fault of old releases of torch
}


def adjust_config(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Adjustment]]:
    """Return `fields` as this machine can run them, and the adjustments that changed something."""
    backend = setup()
    situation = {
        "cpu": not backend.is_cuda,
        "local": backend.spec == "local",
        "no_wgrad_kernel": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None,
    }
    adjusted = dict(fields)
    changes = []
    for adjustment in ADJUSTMENTS:
        if situation[adjustment.when] and adjusted.get(adjustment.field, adjustment.value) != adjustment.value:
            changes.append(adjustment)
        if situation[adjustment.when]:
            adjusted[adjustment.field] = adjustment.value
    if not situation["local"]:
        if "cross_entropy_loss_fusion" not in adjusted:
            adjusted |= {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"}
        for name, value in TE_DEFAULTS.items():
            adjusted.setdefault(name, value)
        if adjusted.get("moe_router_dtype") == "fp64":  # which the fused router does not know
            adjusted["moe_router_fusion"] = False
    keeps_scores = not situation["local"] and getattr(adjusted.get("attention_backend"), "name", "") == "unfused"
    if "core_attn" in (adjusted.get("recompute_modules") or ()) and not keeps_scores:
        # Recomputing SDPA or Transformer Engine's fused attention costs time and saves nothing.
        adjusted["recompute_modules"] = [m for m in adjusted["recompute_modules"] if m != "core_attn"]
        if not adjusted["recompute_modules"] and adjusted.get("recompute_granularity") == "selective":
            adjusted["recompute_granularity"] = None
    return adjusted, changes


# --------------------------------------------------------------------------------------------------------------------
# Layers of the local spec


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that may run under sequence parallelism: its weight is marked, so its gradient is summed over TP ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ConfigError(
                f"normalization {config.normalization!r} (zero-centred: {config.layernorm_zero_centered_gamma}) is not "
                "supported by the local spec; only plain RMSNorm is"
            )
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class CompiledRMSNorm(RMSNorm):
    """RMSNorm as one kernel forward and two backward, for narrow rows such as heads, of which there are many."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return _compiled(_rms_norm)(x, self.weight, self.eps)  # type: ignore[no-any-return]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; torch's compiler takes a second to import."""
    return torch.compile(function)


class SdpaAttention(torch.nn.Module):
    """Causal core attention on torch's scaled_dot_product_attention: GQA, unequal key and value widths, packed input.

    megatron-core's own DotProductAttention knows neither `k_channels`/`v_channels` (MLA) nor packed sequences, and
    keeps all scores in memory.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ConfigError("context parallelism needs Transformer Engine; set --context_parallel_size 1")
        if getattr(config, "window_size", None) is not None:
            raise ConfigError("sliding window attention is not supported; its models use full attention")
        self.config = config
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale if softmax_scale is not None else (k_channels or config.kv_channels) ** -0.5
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        """query [S, B, N, D], key [S, B, G, D], value [S, B, G, Dv] -> [S, B, N*Dv]; packed: [T, N, D] -> [T, N*Dv].

        The mask is causal by construction, so `attention_mask` is not read: padding stands after the real tokens.
        """
        assert attention_bias is None, "no model here passes an attention bias"
        if packed_seq_params is None:
            return self._attend(query, key, value)
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        parts = [
            self._attend(*(x[start:end].unsqueeze(1) for x in (query, key, value))).squeeze(1)
            for start, end in zip(bounds, bounds[1:], strict=False)
            if end > start
        ]
        used = bounds[-1]
        if used < query.shape[0]:  # padding behind the last sample
            parts.append(query.new_zeros(query.shape[0] - used, parts[0].shape[-1]))
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        with self._dropout_generator(dropout):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [B, heads, S, width]
            out = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                dropout_p=dropout,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=query.shape[-2] != key.shape[-2],
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _dropout_generator(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """Heads differ between TP ranks, so dropout there draws from the generator that differs too."""
        if not dropout or self.config.sequence_parallel:
            return contextlib.nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()  # type: ignore[no-any-return]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing to save."""
        return {}


# --------------------------------------------------------------------------------------------------------------------
# Layer specs and on-disk names


def substitute(spec: Any, table: Mapping[Any, Any]) -> Any:
    """Return a copy of a layer spec with classes replaced; follows dataclasses, lists and partial()."""
    if isinstance(spec, type) or isinstance(spec, types.FunctionType):
        return table.get(spec, spec)
    if isinstance(spec, functools.partial):
        args = [substitute(a, table) for a in spec.args]
        kwargs = {k: substitute(v, table) for k, v in spec.keywords.items()}
        return functools.partial(table.get(spec.func, spec.func), *args, **kwargs)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changed = {f.name: substitute(getattr(spec, f.name), table) for f in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changed)
    if isinstance(spec, list | tuple):
        return type(spec)(substitute(item, table) for item in spec)
    return spec


def _is_moe(layer_spec: Any) -> bool:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = layer_spec.submodules.mlp
    kind = getattr(mlp, "module", None) or getattr(mlp, "func", mlp)
    return isinstance(kind, type) and issubclass(kind, MoELayer)


def disk_names(is_moe: bool, is_mla: bool) -> dict[str, str]:
    """Prefixes of the local spec's names in one layer -> the names under which Transformer Engine's spec saves them."""
    names = {}
    if is_mla:
        names["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        names["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not is_moe:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return names


def block_spec(config: Any, vp_stage: int | None = None, replace: Mapping[Any, Any] | None = None) -> Any:
    """Return the TransformerBlockSubmodules of this rank's pipeline stage.

    replace: classes of megatron-core -> a family's own ones (unusual routers, for one).
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    backend = setup()
    use_te = backend.spec == "te"
    spec = get_gpt_decoder_block_spec(config, use_te, normalization=config.normalization, vp_stage=vp_stage)
    if use_te:
        if config.qk_layernorm and not config.multi_latent_attention:
            for layer in spec.layer_specs:
                # Transformer Engine's norm takes longer to start, twice a layer, than to compute on such narrow heads.
                attention = layer.submodules.self_attention.submodules
                attention.q_layernorm = attention.k_layernorm = CompiledRMSNorm
        return substitute(spec, replace) if replace else spec
    spec = substitute(spec, {DotProductAttention: SdpaAttention, WrappedTorchNorm: RMSNorm, **(replace or {})})
    # With Apex installed the local functions pick its norm for the block; every norm here is RMSNorm.
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        if config.multi_latent_attention and config.q_lora_rank is None:
            # The spec names a norm of the query latent, which these models lack; 0.19 refuses what it would not use.
            layer.submodules.self_attention.submodules.q_layernorm = IdentityOp
        layer.submodules.sharded_state_dict_keys_map = disk_names(_is_moe(layer), config.multi_latent_attention)
    return spec


def mtp_spec(config: Any, spec: Any, vp_stage: int | None = None) -> Any:
    """Return the multi-token-prediction block spec for this stage, or None. `spec` is `block_spec`'s result."""
    if not config.mtp_num_layers:
        return None
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    use_te = setup().spec == "te"
    if not spec.layer_specs:  # a stage without decoder layers holds no layer to copy
        return None
    mtp = get_gpt_mtp_block_spec(config, spec, use_te, vp_stage=vp_stage)
    return mtp if use_te or mtp is None else substitute(mtp, {WrappedTorchNorm: RMSNorm})


# --------------------------------------------------------------------------------------------------------------------
# Gradients


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Have linear layers add weight gradients to the fp32 buffers of DDP within their products. With Transformer Engine.

    megatron-core does the same if the model is built so, but asks for Apex then, and a model without DDP cannot run.
    """
    if setup().spec != "te":
        return
    from megatron.core.tensor_parallel import layers
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=_add_product)
    module: Any
    for module in model.modules():
        weights = [p for n, p in module.named_parameters(recurse=False) if n.startswith("weight")]
        if not weights or not all(hasattr(p, "main_grad") and p.main_grad.dtype == torch.float32 for p in weights):
            continue
        if isinstance(module, TransformerEngineBaseModule) and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif hasattr(module, "accumulates"):  # GroupedLinear, whose kernel would round fp32
            module.accumulates = weights[0].dtype != torch.float32
        elif isinstance(module, layers.VocabParallelEmbedding) and not module.deterministic_mode:
            layers.F = types.SimpleNamespace(embedding=_embedding)
        elif isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = True


class _Embedding(torch.autograd.Function):
    """A lookup whose gradient goes to the few rows that were read, in the weight's `main_grad`."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        from transformer_engine.pytorch.module.base import get_dummy_wgrad

        ids, weight = ctx.saved_tensors
        weight.main_grad.index_add_(0, ids.flatten(), gradient.flatten(0, -2).float())
        weight.grad_added_to_main_grad = True
        return None, get_dummy_wgrad(list(weight.shape), weight.dtype)


def _embedding(ids: Tensor, weight: Any) -> Tensor:
    """A tied weight gets a gradient from the output layer too, which is added as a whole."""
    apart = hasattr(weight, "main_grad") and not getattr(weight, "zero_out_wgrad", False)
    if apart and weight.requires_grad and torch.is_grad_enabled():
        return _Embedding.apply(ids, weight)  # type: ignore[no-any-return]
    return torch.nn.functional.embedding(ids, weight)


def _add_product(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
    """total [out, in] fp32 += gradients [T, out] transposed times inputs [T, in]."""
    if inputs.dtype == torch.float32:
        total.addmm_(gradients.t(), inputs)
        return
    torch.addmm(total, gradients.t(), inputs, out_dtype=torch.float32, out=total)


# --------------------------------------------------------------------------------------------------------------------
# Attention kernels

_KERNEL_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
_switched: dict[str, str] = {}


@contextlib.contextmanager
def choosing_attention() -> Iterator[None]:
    """Build a model inside, so that its attention kernels are its own choice.

    A GPTModel writes the choice to the environment and refuses to build after a model of this process that chose
    otherwise. What such a model wrote is taken back first; what the user set stays and is checked.
    """
    for name, value in _switched.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _switched.clear()
    before = {name for name in _KERNEL_SWITCHES if name in os.environ}
    try:
        yield
    finally:
        for name in _KERNEL_SWITCHES:
            if name in os.environ and name not in before:
                if setup().spec == "te":
                    _switched[name] = os.environ[name]
                else:  # nobody reads it, and child processes would inherit it
                    del os.environ[name]


# --------------------------------------------------------------------------------------------------------------------
# Memory and seeds


def reset_peak_memory() -> None:
    if setup().is_cuda:
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak of this process so far: allocated GPU memory, or resident memory on a CPU."""
    if setup().is_cuda:
        return int(torch.cuda.max_memory_allocated())
    return io.peak_memory_bytes()


def synchronize() -> None:
    """Wait for the device, so that a clock read afterwards is honest."""
    if setup().is_cuda:
        torch.cuda.synchronize()


def get_device_rng_state() -> Tensor | None:
    """State of the GPU's generator, None on a CPU (torch's own generator is the one in use there)."""
    return torch.cuda.get_rng_state() if setup().is_cuda else None


def set_device_rng_state(state: Tensor | None) -> None:
    if state is not None and setup().is_cuda:
        torch.cuda.set_rng_state(state)
