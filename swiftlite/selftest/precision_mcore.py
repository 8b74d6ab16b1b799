"""The Megatron side of the precision check: the model run with one part of its weights at a time, free and fed with
Hugging Face's own input of each part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from swiftlite.arguments.megatron_export import conversion_arguments
from swiftlite.checkpoint.bind import convert_hf_config
from swiftlite.megatron.shards import flatten_shards
from swiftlite.selftest.precision_hf import HfRun, Rounding
from swiftlite.utils.errors import VerifyError
from swiftlite.utils.types import Config, Settings

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.module import MegatronModule


class _McoreWeights:
    """Puts the weights of one part of a GPTModel in place, one tensor at a time, by megatron-core's keys and offsets."""

    def __init__(self, iteration: Path, device: torch.device, rounding: Rounding) -> None:
        self.iteration, self.device = iteration, device
        self.rounding = rounding
        self.reader = FileSystemReader(iteration)
        self.metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(self.metadata, True)
        self._shapes: dict[nn.Parameter, torch.Size] = {}

    def release(self, part: nn.Module) -> None:
        for parameter in part.parameters():
            self._shapes.setdefault(parameter, parameter.shape)
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def load(self, part: nn.Module, prefix: str, offsets: tuple[tuple[int, int, int], ...] = ()) -> None:
        """Fill `part` from the checkpoint through torch's reader, by the module's own sharded_state_dict.

        Raises: VerifyError naming a tensor that the checkpoint does not hold or that nothing was read into.
        """
        from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default

        for parameter in part.parameters():
            parameter.data = torch.empty(self._shapes[parameter], dtype=parameter.dtype)
        state = sharded_state_dict_default(part, prefix, offsets, ensure_metadata_has_dp_cp_group(None))
        filled = set()
        for shard in flatten_shards(state):
            self._read(shard)
            filled.add(shard.data.untyped_storage().data_ptr())
        for name, tensor in part.state_dict().items():
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in filled:
                if "_extra_state" not in name and tensor.numel():
                    raise VerifyError(f"{prefix}{name} was not loaded from {self.iteration}")
        for parameter in part.parameters():
            parameter.data = parameter.data.to(self.device)

    def _read(self, shard: ShardedTensor) -> None:
        """Read one shard into its tensor, with torch.distributed.checkpoint's own reader."""
        stored = self.metadata.state_dict_metadata.get(shard.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise VerifyError(f"{shard.key} is not in {self.iteration}")
        size = torch.Size((1,) * shard.prepend_axis_num + tuple(shard.local_shape))
        chunk = ChunkStorageMetadata(torch.Size(shard.global_offset), size)
        raw = torch.empty(size, dtype=stored.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(shard.key, stored, [chunk]))
        self.reader.read_data(plan, cast("LoadPlanner", _IntoTensor(raw))).wait()
        shard.data.copy_(self.rounding(shard.key, raw.view(shard.data.shape)))


class _IntoTensor:
    """The part of a LoadPlanner that reading into one tensor needs."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            self = _IntoTensor(self.target.narrow(dim, start, length))
        return self.target

    def commit_tensor(self, item: object, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """One step of the model. forced: relative error when fed Hugging Face's input; free: of the models' own runs."""

    name: str
    forced: float
    free: float


def run_mcore(
    iteration: Path, config: Config, ids: Tensor, dtype: torch.dtype, hf: HfRun, rounding: Rounding
) -> tuple[list[Part], Tensor]:
    """Run the Megatron model of a checkpoint, free and fed with `hf`.

    Args: config: config.json as a dict. ids: [1, S].
    Returns: the parts in order, logits [1, S, V] of the free run.
    """
    from swiftlite.megatron import backend
    from swiftlite.megatron.distributed import parallel_groups
    from swiftlite.megatron.model.provider import build_models

    args = conversion_arguments(convert_hf_config(config), str(iteration.parent), dtype)
    device = backend.setup().device
    with parallel_groups(args), torch.no_grad():
        model = build_models(args)[0].eval()
        for parameter in model.parameters():  # norms come in fp32; training casts them, and so does Hugging Face
            parameter.data = parameter.data.to(dtype)
        run = _Run(model, hf, _McoreWeights(iteration, device, rounding), device)
        positions = torch.arange(ids.shape[1], device=device)[None]
        return run.parts, model(ids.to(device), positions, None)


class _Run:
    """Hooks of a GPTModel: weights of a part come before it runs; afterwards it is held against Hugging Face's."""

    def __init__(self, model: MegatronModule, hf: HfRun, weights: _McoreWeights, device: torch.device) -> None:
        self.weights, self.device = weights, device
        self.parts: list[Part] = []
        self.feeding = False
        weights.release(model)
        for name, buffer in model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer.to(device)
        tied, layers = model.share_embeddings_and_output_weights, model.decoder.layers
        stacked = not model.config.num_moe_experts and model.config.linear_attention_freq is None
        self._watch("embedding", model.embedding, None, hf.embedding, "embedding.", keep=tied)
        for index, layer in enumerate(layers):
            before = hf.layers[index - 1] if index else hf.embedding
            prefix = "decoder.layers." if stacked else f"decoder.layers.{index}."
            offsets = ((0, index, len(layers)),) if stacked else ()
            self._watch(f"layer {index}", layer, before, hf.layers[index], prefix, offsets)
        norm = model.decoder.final_layernorm
        self._watch("final_layernorm", norm, hf.layers[-1], hf.norm, "decoder.final_layernorm.")
        output_prefix = None if tied else "output_layer."
        self._watch("output_layer", model.output_layer, hf.norm, hf.logits, output_prefix, keep=tied)

    def _watch(
        self,
        name: str,
        part: nn.Module,
        fed: Tensor | None,
        reference: Tensor,
        prefix: str | None,
        offsets: tuple[tuple[int, int, int], ...] = (),
        keep: bool = False,
    ) -> None:
        """fed: Hugging Face's input of the part [1, S, H], None where it is the ids. reference: its output.
        prefix: of its tensors in the checkpoint, None where another part has brought them. keep: they stay.
        """

        def before(module: nn.Module, _: object) -> None:
            if prefix is not None and not self.feeding:
                self.weights.load(module, prefix, offsets)

        def after(
            module: nn.Module, inputs: tuple[object, ...], kwargs: Settings, output: Tensor | tuple[Tensor, ...]
        ) -> None:
            if self.feeding:
                return
            expected, free = reference.to(self.device), _batch_first(output)
            forced = free
            if fed is not None:
                hidden = fed.to(self.device).transpose(0, 1).contiguous()  # [1, S, H] -> [S, 1, H]
                self.feeding = True  # hooks of the model's own run again, these do not
                if "hidden_states" in kwargs:
                    forced = _batch_first(module(*inputs, **{**kwargs, "hidden_states": hidden}))
                else:
                    forced = _batch_first(module(hidden, *inputs[1:], **kwargs))
                self.feeding = False
            self.parts.append(Part(name, relative_error(forced, expected), relative_error(free, expected)))
            if not keep:
                self.weights.release(module)

        part.register_forward_pre_hook(before)
        part.register_forward_hook(after, with_kwargs=True)


def _batch_first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """[S, B, ...], or the first of several results -> [B, S, ...]."""
    return (output[0] if isinstance(output, tuple) else output).transpose(0, 1)  # type: ignore[no-any-return]


def relative_error(mine: Tensor, reference: Tensor) -> float:
    """|mine - reference| / |reference| in L2 norms, computed in fp64."""
    mine, reference = mine.double(), reference.double()
    return float((mine - reference).norm() / reference.norm().clamp_min(1e-30))
