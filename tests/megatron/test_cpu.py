"""What the CPU side takes for granted of megatron-core: a release that changes any of it fails here, and says where."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftlite.megatron import backend, cpu

# Names of torch.cuda in megatron-core that no step on a CPU calls: CUDA graphs, pools, capabilities, user buffers.
# The tensor types are names in type checks, which are rewritten.
ASIDE = {"CUDAGraph", "MemPool", "OutOfMemoryError", "_sleep", "amp", "default_generators", "get_device_capability",
         "get_device_properties", "graph", "graph_pool_handle", "is_available", "memory_stats", "set_stream",
         "FloatTensor", "HalfTensor", "BFloat16Tensor"}  # fmt: skip
# What shims put something else in place of -> its parameters, from the first on.
REPLACED = {
    "tensor_parallel.random": {
        "_get_cuda_rng_state": "device, clone, graph_safe",
        "_set_cuda_rng_state": "new_state, device, graph_safe",
        "CheckpointFunction.forward": "ctx, run_function, distribute_saved_activations, *args",
        "CheckpointWithoutOutput.__init__": "self, fp8",
    },
    "tensor_parallel.mappings": {
        "_AllToAll.forward": "ctx, group, input, output_split_sizes, input_split_sizes",
        "_gather_along_first_dim": "input_, group, output_split_sizes",
        "_reduce_scatter_along_first_dim": "input_, group, input_split_sizes",
    },
    "transformer.moe.moe_utils": {"maybe_move_tensor_to_cpu": "tensor, as_numpy, record_stream"},
    "optimizer.distrib_optimizer": {
        "DistributedOptimizer._set_main_param_and_optimizer_states": "self, model_param, tensors",
        "DistributedOptimizer._get_main_param_and_optimizer_states": "self, model_param",
        "DistributedOptimizer.get_parameter_state_dp_zero": "self, use_gloo_comm, empty_data, return_on_all_ranks",
    },
}


def source_of(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is gone"
    return Path(spec.origin)


def test_megatron_core_uses_no_other_part_of_torch_cuda() -> None:
    asked: dict[str, str] = {}
    for folder in {source_of(module).parent for module in cpu.CORE_MODULES if module.count(".") > 2}:
        for file in folder.glob("*.py"):
            asked |= {name: file.name for name in re.findall(r"\btorch\.cuda\.(\w+)", file.read_text())}
    assert len(asked) > 20
    assert not {name: asked[name] for name in asked.keys() - ASIDE - set(dir(cpu._CpuForCuda))}


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(module, name, parameters) for module, names in REPLACED.items() for name, parameters in names.items()],
)
def test_what_shims_replace_is_as_they_know_it(module: str, name: str, parameters: str) -> None:
    body: list[Any] = ast.parse(source_of(f"megatron.core.{module}").read_text()).body
    for part in name.split("."):
        node = next((node for node in body if getattr(node, "name", None) == part), None)
        assert node is not None, f"{name} is gone"
        body = node.body
    found = ", ".join([a.arg for a in node.args.args] + [f"*{a.arg}" for a in (node.args.vararg,) if a])
    assert f"{found}, ".startswith(f"{parameters}, ")


def constants(code: types.CodeType) -> Iterator[Any]:
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from constants(value)
        yield from value if isinstance(value, tuple) else (value,)


def test_nothing_that_runs_names_cuda() -> None:
    if backend.setup().is_cuda:
        assert "cpu_for_cuda" not in backend.setup().shims
        return
    looked_at = 0
    for module in map(importlib.import_module, cpu.CORE_MODULES):
        assert getattr(module, "torch", None) is not torch, f"{module.__name__} has torch itself"
        for function in cpu._functions(module):
            named = cpu._CPU_NAMES.keys() & {c for c in constants(function.__code__) if isinstance(c, str)}
            assert not named, f"{module.__name__}.{function.__qualname__}"
            looked_at += 1
    assert looked_at > 300


def test_nothing_that_runs_is_compiled() -> None:
    """Also not what a shim has put a function of its own around: to compile takes longer than a tiny run."""
    if backend.setup().is_cuda:
        return
    for module in cpu.core_modules():
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        for function in [
            f for owner in (module, *own) for f in vars(owner).values() if isinstance(f, types.FunctionType)
        ]:
            around = [cell.cell_contents for cell in function.__closure__ or ()]
            compiled = [f for f in (function, *around) if hasattr(f, "_torchdynamo_orig_callable")]
            assert not compiled, f"{module.__name__}: {function.__qualname__}"
