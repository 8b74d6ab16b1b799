"""A transformers model whose weights, gradients and optimizer states are divided over the ranks: torch's FSDP2.

Each layer is gathered while it computes. What is computed is what one process computes: matrices run in the run's dtype,
everything else is gathered as it is held, gradients are added in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from swiftlite.arguments.train import SftArguments
from swiftlite.llm.model import tuner
from swiftlite.llm.train.saving import OPTIMIZER, SHARDED_OPTIMIZER, fill, write_file
from swiftlite.utils.dist import get_world_size
from swiftlite.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, args: SftArguments, device: torch.device) -> None:
    """Leave each rank its share of `model`, in place; what is trained becomes fp32 layer by layer. Collective.

    Raises: UsageError for fp16, and for experts that not every rank has gradients of.
    """
    if args.model_info.torch_dtype == torch.float16:
        raise UsageError("--fsdp with float16: is not supported; use --torch_dtype bfloat16")
    if args.model_info.is_moe_model and transformers.__version__[0] == "4":
        raise UsageError("--fsdp: a model with experts needs transformers 5; pip install -U transformers")
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if "offload" in args.fsdp else OffloadPolicy()
    mesh = init_device_mesh(device.type, (get_world_size(),))
    dtype = args.model_info.torch_dtype
    computes = None if dtype == torch.float32 else dtype
    matrices = MixedPrecisionPolicy(computes, torch.float32, cast_forward_inputs=False)
    as_held = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = set(getattr(model, "_no_split_modules", None) or ())
    # A frozen model has no backward pass that would end the time for which weights stay gathered.
    again = "full_shard" in args.fsdp or not any(parameter.requires_grad for parameter in model.parameters())
    units = [(module, matrices) for module in model.modules() if type(module).__name__ in layers]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if all(type(end) in (nn.Embedding, nn.Linear) for end in ends) and ends[0].weight is not ends[1].weight:
        units += [(ends[0], as_held), (ends[1], matrices)]
    groups: list[tuple[list[nn.Module], MixedPrecisionPolicy]] = [([unit], policy) for unit, policy in units]
    if (
        computes is not None
    ):  # norms and routers are not cast; they are one group, as each group costs milliseconds a pass
        small = [
            part for unit, policy in units if policy is matrices for part in unit.modules() if not _is_matrix(part)
        ]
        groups = [(small, as_held), *groups] if small else groups
    groups.append(([model], as_held))
    for modules, policy in groups:
        for module in modules:
            tuner.raise_to_fp32(module)
        fully_shard(modules, mesh=mesh, reshard_after_forward=again, mp_policy=policy, offload_policy=offload)
    model.register_load_state_dict_pre_hook(_divide)


def release(model: nn.Module) -> None:
    """Let gathered weights go, which a pass without gradients leaves there with shard_grad_op."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _is_matrix(module: nn.Module) -> bool:
    """Does autocast compute with all that `module` itself holds in the run's dtype? Also if that is nothing."""
    own = list(module.parameters(recurse=False))
    return isinstance(module, nn.Linear) or not own or any(True for _ in module.children()) or own[0].dim() == 3


def _divide(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """What is loaded into a sharded model may be whole."""
    for name, parameter in model.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if name in state and isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            values = state[name].to(mesh.device_type)
            state[name] = distribute_tensor(values, mesh, parameter.placements, src_data_rank=None)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Each rank's part of the states of all parameters. Collective."""
    states = ((name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state)
    write_file(directory / SHARDED_OPTIMIZER, {f"{n}.{key}": value for n, s in states for key, value in s.items()})


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """The states that a run has saved, sharded or not, for one that is sharded or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    path = directory / SHARDED_OPTIMIZER
    stored: dict[int, dict[str, Tensor]]
    if path.is_file():
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        numbers = {names[id(parameter)]: number for number, parameter in enumerate(parameters)}
        stored = {number: {} for number in numbers.values()}
        with safe_open(path, "pt") as file:
            for entry in file.keys():  # noqa: SIM118
                name, _, key = entry.rpartition(".")
                stored[numbers[name]][key] = file.get_tensor(entry)
    else:
        stored = torch.load(directory / OPTIMIZER, map_location="cpu", weights_only=True)["state"]
    state = {n: {key: _like(parameters[n], value) for key, value in of.items()} for n, of in stored.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value`, which is whole, sharded as `parameter` is if it has its shape."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    part = torch.zeros_like(parameter, dtype=value.dtype)
    fill(part, value)
    return part
