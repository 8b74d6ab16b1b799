"""A loaded model's tensors under the names that its checkpoint has for them, and what a checkpoint holds besides.

transformers 5 joins experts into one tensor and renames some parameters; files and flags keep the checkpoint's names.
"""

from __future__ import annotations

import bisect
import fnmatch
import importlib.util
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from swiftlite.families import family_of
from swiftlite.families.hf_config import architecture_of, text_config, wrapped_family
from swiftlite.utils.errors import CheckpointError, ConfigError
from swiftlite.utils.text import listing
from swiftlite.utils.types import Config
from swiftlite.weights.rule import NAMINGS
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint in a live model.

    owner: the parameter or buffer that holds it, perhaps sharded. first: where it begins there, in elements.
    """

    owner: Tensor
    first: int
    shape: torch.Size

    @property
    def view(self) -> Tensor:
        """Its part of an owner that is whole on this rank."""
        return self.owner.data.reshape(-1)[self.first : self.first + self.shape.numel()].view(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.owner.shape

    def local(self) -> tuple[Tensor, int]:
        """(its elements on this rank, flat, in the owner's memory; number of the first of them). Maybe none."""
        part, begin = local_part(self.owner)
        low, high = max(begin, self.first), min(begin + len(part), self.first + self.shape.numel())
        return part[low - begin : max(low, high) - begin], low - self.first


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """(elements of `tensor` on this rank, flat, in its memory; number of the first of them): all of one that is whole.

    Rows of a sharded one are divided as torch.chunk does.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1), 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())
    begin = min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return tensor.to_local().reshape(-1), begin * tensor.shape[1:].numel()


def _in_files(name: str, renamed: Mapping[str, str]) -> str:
    """A live model's name as transformers 4 writes it. renamed: its table, pattern of the files' names -> live prefix."""
    for pattern, live in renamed.items():
        if name.startswith(live):
            return re.sub(r"\(.*\)", "", pattern.lstrip("^")) + name[len(live) :]
    return name


def checkpoint_tensors(model: PreTrainedModel, parts: Sequence[nn.Module] = ()) -> dict[str, Stored]:
    """Every tensor that a checkpoint of `model` holds, under its name there. Tied weights come under each name.

    Args: parts: of these modules alone.
    Raises: ConfigError for a model whose parameters are not rows of the checkpoint's tensors.
    """
    live: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if parts:
        held = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
        live = {name: tensor for name, tensor in live.items() if id(tensor) in held}
    if not _joins():
        renamed = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return {_in_files(name, renamed): Stored(tensor, 0, tensor.shape) for name, tensor in live.items()}
    from transformers.core_model_loading import revert_weight_conversion

    # The library's own way back, done with row numbers in place of rows, says where each tensor comes from.
    starts, owners = [], []
    numbers, total = {}, 0
    for name, tensor in live.items():
        lead = tensor.shape[:-1]
        rows = torch.arange(total, total + lead.numel(), device="cpu")  # also where a model is built on meta
        # Two columns: some releases drop every dimension of size 1 on the way.
        numbers[name] = rows.view(*lead, 1).expand(*lead, 2) if tensor.dim() else rows.view(())
        starts.append(total)
        owners.append(tensor)
        total += lead.numel()
    # Where files have matrices either way, the library looks at the shape that the model has: here that of the numbers.
    model.get_parameter = numbers.__getitem__  # type: ignore[assignment]
    try:
        reverted = revert_weight_conversion(model, numbers)
    finally:
        del model.get_parameter
    found = {}
    for name, numbered in reverted.items():
        rows = numbered[..., 0] if numbered.dim() else numbered
        first, count = int(rows.flatten()[0]), rows.numel()
        index = bisect.bisect_right(starts, first) - 1
        owner = owners[index]
        first -= starts[index]
        ordered = torch.equal(rows.flatten(), torch.arange(count, device="cpu") + first + starts[index])
        if not ordered or numbered.shape[-1:] not in ((2,), ()) or first + count > owner.shape[:-1].numel():
            raise ConfigError(f"{type(model).__name__}: how {name} lies in the loaded model is not known")
        found[name] = Stored(owner, first * owner.shape[-1:].numel(), torch.Size([*rows.shape, *owner.shape[-1:]]))
    return found


@dataclass(frozen=True)
class Others:
    """What a model directory may hold that transformers does not load: MTP blocks, copies, tensors that are derived.

    prefixes: of MTP blocks that config.json announces. copies: name -> the tensor that it repeats. ignored: patterns.
    """

    prefixes: tuple[str, ...] = ()
    copies: Mapping[str, str] | None = None
    ignored: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config) -> Others:
        """By the model family's rules; without a family only what old releases of transformers wrote besides."""
        try:
            family = family_of(architecture_of(config))
        except ConfigError:
            return cls(ignored=("*.rotary_emb.inv_freq",))
        weights, text = family.weights, text_config(config)
        tied = "model.embed_tokens.weight" if text.get("tie_word_embeddings") else "lm_head.weight"
        first = int(text.get("num_hidden_layers") or 0)
        count = family.num_mtp(text)
        blocks = [f"{str(weights.mtp_layer).format(index=i, number=first + i)}." for i in range(count)]
        blocks += [s.name for rule in weights.mtp for s in rule.hf if count and "{layer}" not in s.name]
        copies = {}
        for duplicate in weights.duplicates:
            of = tied if duplicate.of == "lm_head.weight" else duplicate.of
            for block in blocks if "{layer}" in duplicate.name else ("",):
                copies[duplicate.name.format(layer=block.removesuffix("."))] = of
        if wrapped_family(config) is not None:  # as any release of transformers calls them
            blocks = [naming(block) for naming in NAMINGS for block in blocks]
            copies = {naming(name): naming(of) for naming in NAMINGS for name, of in copies.items()}
        return cls(tuple(blocks), copies, weights.ignore)

    def has(self, name: str) -> bool:
        return (
            name.startswith(self.prefixes)
            or name in (self.copies or {})
            or any(fnmatch.fnmatch(name, pattern) for pattern in self.ignored)
        )

    def carried(self, directory: Path, held: Container[str]) -> dict[str, str]:
        """The MTP blocks of the model in `directory`, for a checkpoint with the tensors `held`.

        Returns: name -> itself, or for copies of embedding and head the tensor of `held` that they follow.
        """
        if not self.prefixes:
            return {}
        blocks = [n for n in SafetensorsSource(directory).tensors if n.startswith(self.prefixes) and n not in held]
        copies = self.copies or {}
        return {name: copies[name] if copies.get(name) in held else name for name in blocks}


def check_names(missing: Iterable[str], unexpected: Iterable[str], where: str | Path) -> None:
    """Raises: CheckpointError if there is a name in either."""
    parts = listing("missing", sorted(missing), 3), listing("unknown", sorted(unexpected), 3)
    if any(parts):
        raise CheckpointError(
            f"{where} does not hold this model's weights: {'; '.join(filter(None, parts))}. Check that all of its files "
            "are there and that config.json is theirs"
        )


def load_tensors(model: PreTrainedModel, directory: Path, others: Others) -> None:
    """Fill `model` with the safetensors files of a checkpoint that was saved from one like it.

    Raises: CheckpointError naming tensors that are missing, unknown or of another shape.
    """
    wanted, source = checkpoint_tensors(model), SafetensorsSource(directory)
    held = {id(wanted[name].owner) for name in source.tensors if name in wanted}
    missing = [n for n, stored in wanted.items() if n not in source.tensors and not _is_alias(stored, held)]
    check_names(missing, [n for n in source.tensors if n not in wanted and not others.has(n)], directory)
    with Files() as files, torch.no_grad():
        for name, located in source.tensors.items():
            if name not in wanted:
                continue
            stored = wanted[name]
            if located.spec.shape != tuple(stored.shape):
                raise CheckpointError(
                    f"{located.file}: {name} has shape {list(located.spec.shape)}, the model has {list(stored.shape)}; "
                    "they do not belong together"
                )
            part, first = stored.local()
            values = torch.empty(len(part), dtype=located.spec.dtype)
            source.read(name, first, values, files)
            part.copy_(values)


def _is_alias(stored: Stored, held: set[int]) -> bool:
    """A second name of a tied weight that the files have under the first."""
    return stored.is_whole and id(stored.owner) in held


NO_GRADIENTS = ".indexer."  # in names of attention's parts that choose tokens: a choice has no gradient


def keep_declared_frozen(model: PreTrainedModel) -> None:
    """Let parameters that the model's class declares without gradient have none: transformers 5 forgets it on loading.
    So, too, those that get none, which weight decay would move.

    That release has built the class on the meta device before, as is done here.
    """
    if not _joins():
        return
    with torch.device("meta"):
        declared = type(model)(model.config)
    frozen = {name for name, parameter in declared.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if name in frozen or NO_GRADIENTS in name:
            parameter.requires_grad_(False)


def _joins() -> bool:
    """Does this release of transformers join and rename a checkpoint's tensors?"""
    return importlib.util.find_spec("transformers.core_model_loading") is not None
