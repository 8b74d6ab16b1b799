"""megatron-core on a CPU: its modules are rewritten in memory, so that what they ask of CUDA is done by the CPU.

Shims (shims.py) apply what stands here; nothing happens at import.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Modules that a training run uses; a shim that rewrites modules must find all of them loaded.
CORE_MODULES = (
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


def core_modules() -> list[types.ModuleType]:
    for name in CORE_MODULES:
        importlib.import_module(name)
    return [m for name, m in sorted(sys.modules.items()) if name.startswith("megatron.core") and m is not None]


class _NullStream:
    """Stands for CUDA streams and events: on a CPU everything is already in order."""

    def record_event(self, *_: object) -> _NullStream:
        return self

    def _nothing(self, *_: object, **__: object) -> None:
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

    def Stream(self, *_: object, **__: object) -> _NullStream:  # noqa: N802 (torch's name)
        return self._stream

    Event = Stream

    def current_stream(self, *_: object) -> _NullStream:
        return self._stream

    default_stream = current_stream

    def stream(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _nothing(self, *_: object, **__: object) -> None:
        return None

    synchronize = empty_cache = set_device = _nothing

    def memory_allocated(self, *_: object) -> int:
        return 0

    memory_reserved = max_memory_allocated = memory_allocated

    def is_current_stream_capturing(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, *_: object, **__: object) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: object, **__: object) -> None:
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


def _retarget_constant(value: object) -> Any:
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

    def unwrap(obj: object) -> Iterator[types.FunctionType]:
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


def use_cpu_for_cuda() -> None:
    stand_in = _TorchOnCpu()
    for module in core_modules():
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


def tensor_cuda_is_identity() -> None:
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def run_uncompiled() -> None:
    for module in core_modules():
        for name, value in list(vars(module).items()):
            original = getattr(value, "_torchdynamo_orig_callable", None)
            if original is not None and not isinstance(value, type):
                setattr(module, name, original)
            elif isinstance(value, type) and value.__module__ == module.__name__:
                for key, member in list(vars(value).items()):
                    original = getattr(member, "_torchdynamo_orig_callable", None)
                    if original is not None:
                        setattr(value, key, original)
