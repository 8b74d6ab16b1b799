"""Checkpoints of a live run: torch_dist with optimizer, RNG state and position; tracker file; rotation; resumption.

A checkpoint is written into a hidden sibling and renamed when it is complete; the tracker file moves after that. So a
run that is killed at any moment leaves the previous checkpoint in use. Offline conversion is in `convert`.
"""

from __future__ import annotations

import copy
import io
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from swiftlite.arguments.megatron_train import MegatronSftArguments
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.megatron import backend
from swiftlite.megatron.background import Write
from swiftlite.megatron.shards import LiveMap, iter_shards, unwrap
from swiftlite.utils.directories import TRACKER
from swiftlite.utils.dist import all_gather
from swiftlite.utils.errors import CheckpointError, reason
from swiftlite.utils.io import replace_directory, write_text_atomic
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Json, Settings
from swiftlite.weights.dcp_file import common_state, load_common
from swiftlite.weights.shard import read_shard
from swiftlite.weights.storage import Files, TensorSpec
from swiftlite.weights.torch_dist import slot_of
from swiftlite.weights.unpickle import check_saved

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

logger = get_logger()

_STATE = "swiftlite"  # our own part of common.pt


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


def checkpoint_metadata() -> Settings:
    """How optimizer states are laid out on disk: per parameter, whole, independent of any parallel layout.

    One format exists because the distributed optimizer is used at every size.
    """
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True),
    }


def hf_directory(checkpoint: Path) -> Path:
    """Where the Hugging Face form of an iteration's directory is."""
    return checkpoint.with_name(f"{checkpoint.name}-hf")


def iteration_name(iteration: int) -> str:
    return f"iter_{iteration:07d}"


# ---- state dicts ----


def _model_states(models: Sequence[torch.nn.Module], metadata: Settings) -> ShardedStateDict:
    """{'model': ...}, or {'model0': ..., 'model1': ...} for virtual pipeline stages, as Megatron-LM names them."""
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    states = {}
    for name, model in zip(names, models, strict=True):
        inner = _saved_part(model)
        state = inner.shards() if inner is not unwrap(model) else inner.sharded_state_dict(metadata=dict(metadata))
        states[name] = {key: value for key, value in state.items() if "_extra_state" not in key}
    return states


def _leaves_out_layers(models: Sequence[torch.nn.Module]) -> bool:
    """Is something frozen of what checkpoints hold?"""
    return any(not p.requires_grad for model in models for p in _saved_part(model).parameters())


def _saved_part(model: MegatronModule) -> MegatronModule:
    """What checkpoints hold of a model: its adapters if it has some, all of it otherwise."""
    inner = unwrap(model)
    return getattr(inner, "adapters", inner)


def _rng_state() -> list[dict[str, object]]:
    return [
        {
            "random_rng_state": random.getstate(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": backend.get_device_rng_state(),
            "rng_tracker_states": get_cuda_rng_tracker().get_states(),
        }
    ]


def _rng_object() -> ShardedObject:
    pp, tp = mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
    here = (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank())
    replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng_state", _rng_state(), (pp, tp), here, replica_id=replica)


def _layout() -> dict[str, int]:
    """The sizes on which the saved RNG states depend."""
    return {
        "tp": mpu.get_tensor_model_parallel_world_size(),
        "pp": mpu.get_pipeline_model_parallel_world_size(),
        "ep": mpu.get_expert_model_parallel_world_size(),
    }


def _tensors(state: ShardedStateDict | list[Any]) -> Iterator[tuple[ShardedStateDict | list[Any], Any, ShardedTensor]]:
    """(container, key, tensor) of every ShardedTensor in a nested state dict."""
    items: Any = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in list(items):
        if isinstance(value, ShardedTensor):
            yield state, key, value
        else:
            yield from _tensors(value)


def _optimizer_parts(state: ShardedStateDict) -> list[ShardedStateDict]:
    """The states of the optimizers that a chained one consists of; a chain of one has no level of its own."""
    return [state] if "param_state" in state else [state[index] for index in sorted(state)]


def _allocate_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state before the first step: only what exists can be loaded into."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if isinstance(inner, HybridDeviceOptimizer) and not inner.state:
            inner.dummy_step()
        if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            continue  # fused optimizers keep no step per parameter and allocate by themselves
        _give_step(inner, 0)
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def _give_step(inner: Any, step: int) -> None:
    """Let an optimizer that holds no parameters, all being frozen, tell a step: megatron-core asks each for one."""
    if not any(group["params"] for group in inner.param_groups):
        inner.state["step"] = {"step": torch.tensor(float(step))}


def _agree_on_step(optimizer: MegatronOptimizer) -> None:
    """Tell torch optimizers without parameters the step of those that have some. Collective."""
    parts = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    adams = [inner for inner in parts if isinstance(inner, torch.optim.Adam | torch.optim.AdamW)]
    mine = [int(state["step"]) for inner in adams for state in inner.state.values()]
    step = max(step for steps in all_gather(mine) for step in [0, *steps])
    for inner in adams:
        _give_step(inner, step)


def _cut_vocabulary(state: ShardedStateDict, vocab_size: int) -> None:
    """Leave out the rows that pad the live vocabulary, in weights and optimizer states: on disk it is Hugging Face's."""
    removed = []
    for container, key, tensor in _tensors(state):
        if not tensor.allow_shape_mismatch or tensor.global_shape[0] <= vocab_size:
            continue
        start = tensor.global_offset[0]
        rows = min(tensor.local_shape[0], vocab_size - start)
        if rows <= 0:
            removed.append((container, key))
            continue
        container[key] = replace(
            tensor,
            data=tensor.data[:rows],
            local_shape=(rows, *tensor.local_shape[1:]),
            global_shape=(vocab_size, *tensor.global_shape[1:]),
            axis_fragmentations=None,  # the last rank's part is smaller: no regular grid
        )
    for container, key in removed:
        del container[key]


def carried_tensors(models: Sequence[torch.nn.Module], origin: Checkpoint, directory: Path) -> dict[str, ShardedTensor]:
    """Tensors of the origin that the live model does not hold (MTP blocks that are not trained), on rank 0. Collective.

    They go unchanged into every checkpoint of the run. directory: has room for them; memory holds none of them.
    """
    live = LiveMap(origin.bound)
    entries = (live.entry(shard)[0] for shard in iter_shards(models))
    held = set[tuple[str, int | None]]().union(*all_gather({(entry.mcore, entry.expert) for entry in entries}))
    tensors: dict[str, ShardedTensor] = {}
    if torch.distributed.get_rank() == 0:
        left = [entry for entry in origin.bound.entries if (entry.mcore, entry.expert) not in held]
        specs = [TensorSpec(origin.source.value_dtype(entry.hf[0]), entry.shape) for entry in left]
        with Files() as files:
            for entry, data in zip(left, _on_disk(specs, directory), strict=True):
                slot = slot_of(entry)
                data.copy_(read_shard(origin.source, entry, (0,) * len(entry.shape), entry.shape, files, data.dtype))
                offsets = [(axis, i, n) for axis, (i, n) in enumerate(zip(slot.index, slot.lead, strict=True))]
                tensors[entry.label] = ShardedTensor.from_rank_offsets(
                    slot.key, data, *offsets, prepend_axis_num=len(slot.lead)
                )
        if tensors:
            logger.info("%d tensors that training does not hold go unchanged into every checkpoint", len(tensors))
    return tensors


def _on_disk(specs: Sequence[TensorSpec], directory: Path) -> list[torch.Tensor]:
    """Tensors in a file without a name: what is not in use need not be in memory."""
    sizes = [-(-spec.nbytes // 64) * 64 for spec in specs]
    if not sum(sizes):
        return [torch.empty(spec.shape, dtype=spec.dtype) for spec in specs]
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=directory) as file:
        file.truncate(sum(sizes))
        pages = mmap(file.fileno(), sum(sizes))
    starts = accumulate(sizes, initial=0)
    return [
        torch.frombuffer(pages, dtype=spec.dtype, count=spec.numel, offset=start).view(spec.shape)
        for spec, start in zip(specs, starts, strict=False)
    ]


# ---- saving ----


def _contents(
    position: Position,
    models: Sequence[torch.nn.Module],
    args: MegatronSftArguments,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler,
    carried: Mapping[str, ShardedTensor] | None,
) -> tuple[dict[str, object], ShardedStateDict]:
    """(what common.pt holds, sharded states) of a checkpoint. Collective."""
    # Layers in one tensor need an optimizer state of every layer.
    metadata = {**checkpoint_metadata(), "non_homogeneous_layers": any(all_gather(_leaves_out_layers(models)))}
    progress = {"consumed_train_samples": position.consumed_samples, "iteration": position.iteration}
    common = common_state({**args.checkpoint_args(), **progress}, position.iteration)
    common["content_metadata"] = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    common[_STATE] = {"consumed_samples": position.consumed_samples, "layout": _layout(), "has_optimizer": False}
    state = _model_states(models, metadata)
    weights = dict(state)
    if carried:
        state["carried"] = dict(carried)
    common["opt_param_scheduler"] = scheduler.state_dict()
    if optimizer is not None:
        _agree_on_step(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=False, metadata=metadata)
        if not args.no_save_rng:
            state["rng_state"] = _rng_object()
        parts = _optimizer_parts(state["optimizer"])
        for group in (group for part in parts for group in part["optimizer"]["param_groups"]):
            for name in [name for name, value in group.items() if isinstance(value, type)]:
                del group[name]  # optimizer classes, which common.pt cannot hold
        first = parts[0]
        step = next(group["step"] for group in first["optimizer"]["param_groups"] if "step" in group)
        common[_STATE].update(
            has_optimizer=True, has_rng=not args.no_save_rng, step=int(step), grad_scaler=first.get("grad_scaler")
        )
    assert args.description.padded_vocab_size is not None
    _cut_vocabulary(state, args.description.padded_vocab_size)
    return common, state


def prepare_checkpoint(
    root: Path,
    position: Position,
    models: Sequence[torch.nn.Module],
    args: MegatronSftArguments,
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler,
    carried: Mapping[str, ShardedTensor] | None = None,
    complete: Callable[[Path], None] | None = None,
    beside: Callable[[Path], None] | None = None,
    background: bool = False,
) -> tuple[Path, Write]:
    """Decide what goes into `root`/iter_XXXXXXX; the write that comes back fills it and moves the tracker. Collective.

    Args: optimizer: None leaves it and the RNG state out (weights only). carried: see carried_tensors.
        beside: adds files to the directory, on rank 0, now. complete: does so before the directory takes its name.
        background: another process will write.
    Returns: the iteration's directory, and its write.
    """
    common, state = _contents(position, models, args, optimizer, scheduler, carried)
    name = iteration_name(position.iteration)
    temporary, final = root / f".{name}.saving", root / name
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    if rank == 0 and beside is not None:
        beside(temporary)

    def publish() -> None:
        torch.distributed.barrier()
        if rank == 0:
            _write_common(temporary / "common.pt", common)
            if complete is not None:
                complete(temporary)
            replace_directory(temporary, final)
            write_text_atomic(root / TRACKER, str(position.iteration))
        torch.distributed.barrier()

    contents = {**common, **state}
    save = partial(dist_checkpointing.save, contents, str(temporary), content_metadata=common["content_metadata"])
    if not background:
        return final, Write(0, save, lambda: save, [publish])
    nbytes = sum(t.data.nbytes for _, _, t in _tensors(state) if t.data is not None and is_main_replica(t.replica_id))
    with backend.results_in_file(temporary / f".results-{rank}"):
        request = save(async_sharded_save=True, **backend.async_save_options())
    return final, Write(nbytes, lambda: _stage(request)(), lambda: _stage(request), [*request.finalize_fns, publish])


def _stage(request: AsyncRequest) -> Callable[[], None]:
    """What megatron-core's AsyncCallsQueue does before it starts a process."""
    if request.async_fn is None:  # nothing to write on this rank
        return lambda: None
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        arguments[1] = request.preload_fn()
    return partial(request.async_fn, *arguments, **request.async_fn_kwargs)


def _write_common(path: Path, common: Mapping[str, object]) -> None:
    """Write common.pt. Some releases of megatron-core write none, others make a plain dict of `args`, which
    Megatron-LM reads by attribute (see common_state)."""
    written = torch.load(path, weights_only=True) if path.is_file() else {}
    torch.save({**written, **common}, path)


# ---- loading ----


def check_file(path: Path) -> None:
    """One file of a checkpoint, before any is loaded. Raises: CheckpointError for what is cut off or missing."""
    if path.name != ".metadata":
        return
    if not (path.parent / "common.pt").is_file():
        raise CheckpointError(f"{path.parent / 'common.pt'} is missing")
    ends: dict[str, int] = {}
    objects: dict[str, list[_StorageInfo]] = {}  # of the random generators, the only ones that are loaded
    for index, info in FileSystemReader(path.parent).read_metadata().storage_data.items():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        if index.fqn.startswith("rng_state"):
            objects.setdefault(info.relative_path, []).append(info)
    for name, end in sorted(ends.items()):
        part = path.parent / name
        if not part.is_file():
            raise CheckpointError(f"{part} is missing")
        if part.stat().st_size < end:
            raise CheckpointError(f"{part} has {part.stat().st_size} of at least {end} bytes")
        with part.open("rb") as file:
            for info in objects.get(name, ()):
                file.seek(info.offset)
                check_saved(io.BytesIO(file.read(info.length)), part)


def load_checkpoint(
    directory: Path,
    models: Sequence[torch.nn.Module],
    args: MegatronSftArguments,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> Position:
    """Load an `iter_*` directory of a run into live models, optimizer and scheduler, under any parallel layout.

    The random generators resume where they were if the layout is the one that was saved. Collective.
    Raises: CheckpointError if the checkpoint is incomplete or belongs to another model.
    """
    common = load_common(directory)
    metadata = {**checkpoint_metadata(), **(common.get("content_metadata") or {})}
    mine = common.get(_STATE) or {}
    state = _model_states(models, metadata)
    has_optimizer = bool(mine.get("has_optimizer")) and not args.no_load_optim
    optimizer_state: ShardedStateDict = {}
    if has_optimizer:
        _allocate_optimizer_state(optimizer)
        optimizer_state = optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=metadata)
        # Only the tensors are asked for. Parameter groups differ by layout (experts have their own only with EP) and
        # hold nothing but the step that arguments and schedule do not give.
        # A pipeline stage, or the experts, may train nothing: then there are none.
        parts = _optimizer_parts(optimizer_state)
        state["optimizer_tensors"] = {i: part["param_state"] for i, part in enumerate(parts) if part["param_state"]}
    has_rng = mine.get("layout") == _layout() and bool(mine.get("has_rng")) and not args.no_load_rng
    if has_rng:
        state["rng_state"] = _rng_object()
    try:
        loaded = dist_checkpointing.load(state, str(directory))
    except (Exception, CheckpointException) as error:  # the latter is not an Exception
        raise CheckpointError(f"{directory} cannot be loaded: {reason(error)}") from error
    _load_models(models, loaded)
    if has_optimizer:
        for i, part in enumerate(parts):
            part["param_state"] = loaded.get("optimizer_tensors", {}).get(i, {})
            for group in part["optimizer"]["param_groups"]:
                group["step"] = mine["step"]
            if mine.get("grad_scaler") is not None:
                part["grad_scaler"] = mine["grad_scaler"]
        optimizer.load_state_dict(optimizer_state)
    else:
        optimizer.reload_model_params()
        logger.warning(
            "%s: only the weights are taken, the optimizer begins anew at the step's learning rate", directory
        )
    consumed = int(mine.get("consumed_samples", common["args"].get("consumed_train_samples", 0)))
    if "opt_param_scheduler" in common:
        scheduler.load_state_dict(copy.deepcopy(common["opt_param_scheduler"]))
    else:
        scheduler.step(increment=consumed)
    if has_rng:
        _set_rng_state(loaded["rng_state"][0])
    elif mine.get("has_rng"):
        logger.info("the parallel layout changed: random generators start anew")
    return Position(int(common["iteration"]), consumed)


def _load_models(models: Sequence[torch.nn.Module], loaded: ShardedStateDict) -> None:
    names = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    for name, model in zip(names, models, strict=True):
        result = _saved_part(model).load_state_dict(loaded[name], strict=False)
        missing = [key for key in result.missing_keys if "_extra_state" not in key]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"the checkpoint does not fit the model: missing {', '.join(missing[:3]) or 'nothing'}, "
                f"unknown {', '.join(result.unexpected_keys[:3]) or 'nothing'}"
            )


def _set_rng_state(state: Json) -> None:
    random.setstate(state["random_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    backend.set_device_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
