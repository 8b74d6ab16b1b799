"""Megatron's `torch_dist` checkpoints seen as a model: which part of which global tensor an entry of the map is.

A checkpoint holds global tensors: parallel sizes are absent, layers of a homogeneous model are stacked in a leading
[L], experts in a leading [E]. Each chunk of a tensor is a record of its own (torch_record.py) in a file (dcp_file.py);
reading and writing go by byte position, and a part of a chunk costs only its own bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from swiftlite.utils.errors import MapError, ShapeError
from swiftlite.weights.dcp_file import DistPlan, TorchDistSource
from swiftlite.weights.ops import Segment
from swiftlite.weights.rule import BoundMap, Entry, clip
from swiftlite.weights.storage import Extent, TensorSpec, WeightSource

# Names that other specs and versions write for the same tensor; the canonical name is the Transformer Engine spec's.
OTHER_NAMES = (
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)


@dataclass(frozen=True)
class Slot:
    """`key[index]` holds an entry; `lead` are the sizes of the leading dimensions that `index` runs over."""

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


def slot_of(entry: Entry, stacked: bool | None = None) -> Slot:
    """Where Megatron saves an entry. stacked: layers in one tensor; default: as Megatron does for this model."""
    model = entry.model
    if stacked is None:
        stacked = model.homogeneous
    index: tuple[int, ...] = () if entry.expert is None else (entry.expert,)
    lead: tuple[int, ...] = () if entry.expert is None else (model.experts,)
    if entry.stack == "decoder.layers" and stacked:
        assert entry.index is not None
        return Slot(f"{entry.stack}.{entry.name}", (entry.index, *index), (model.num_layers, *lead))
    return Slot(entry.mcore, index, lead)


def candidates(entry: Entry) -> Iterator[Slot]:
    """Every place where some Megatron version or spec keeps this entry, the usual one first."""
    for stacked in (entry.model.homogeneous, not entry.model.homogeneous):
        slot = slot_of(entry, stacked)
        yield slot
        for ours, theirs in OTHER_NAMES:
            if ours in slot.key:
                yield Slot(slot.key.replace(ours, theirs), slot.index, slot.lead)
        if ".transformer_layer." in slot.key:
            yield Slot(slot.key.replace(".transformer_layer.", ".mtp_model_layer."), slot.index, slot.lead)


@dataclass(frozen=True)
class McoreView:
    """A torch_dist checkpoint seen through a bound map: entries by canonical name, wherever it keeps them."""

    source: TorchDistSource
    bound: BoundMap
    slots: Mapping[tuple[str, int | None], Slot]

    @classmethod
    def open(cls, source: TorchDistSource, bound: BoundMap) -> McoreView:
        """Find every entry. Raises: MapError naming missing and unknown tensors, ShapeError for the first wrong shape.

        A vocabulary may be padded in the file: more rows than the model has are allowed for the first dimension of the
        embedding and the output layer.
        """
        slots: dict[tuple[str, int | None], Slot] = {}
        missing = []
        for entry in bound.entries:
            slot = next((s for s in candidates(entry) if s.key in source.tensors), None)
            if slot is None:
                missing.append(entry.label)
                continue
            stored, wanted = source.spec(slot.key).shape, (*slot.lead, *entry.shape)
            padded_ok = "vocab" in entry.rule.hf[0].dims and stored[1:] == wanted[1:] and stored[0] >= wanted[0]
            if stored != wanted and not padded_ok:
                raise ShapeError(
                    f"{slot.key} in {source.directory} has shape {list(stored)}, but config.json makes it "
                    f"{list(wanted)}"
                )
            slots[entry.mcore, entry.expert] = slot
        unknown = sorted(set(source.tensors) - {s.key for s in slots.values()})
        if bound.model.tied:  # split over pipeline stages it keeps a second copy of the embedding
            unknown = [name for name in unknown if name != "output_layer.weight"]
        if missing or unknown:
            parts = [
                f"{len(n)} {what} tensors, first {n[0]}"
                for what, n in (("missing", missing), ("unknown", unknown))
                if n
            ]
            raise MapError(
                f"{source.directory} does not match the model's config.json: {'; '.join(parts)}. "
                "Check that the checkpoint is complete and belongs to this model"
            )
        return cls(source, bound, slots)

    def spec(self, entry: Entry) -> TensorSpec:
        """Type and shape of an entry, without leading dimensions."""
        slot = self.slots[entry.mcore, entry.expert]
        return TensorSpec(self.source.spec(slot.key).dtype, entry.shape)

    def extents(self, entry: Entry, start: int, stop: int) -> Iterator[Extent]:
        """Bytes [start, stop) of the entry's own row-major tensor."""
        slot = self.slots[entry.mcore, entry.expert]
        position = 0
        for value, size in zip(slot.index, slot.lead, strict=True):
            position = position * size + value
        base = position * self.spec(entry).nbytes
        yield from self.source.extents(slot.key, base + start, base + stop)


class HfNames(WeightSource):
    """The same checkpoint as Hugging Face tensors: a WeightSource that finds their bytes through the inverse gather."""

    def __init__(self, view: McoreView) -> None:
        self.view = view
        self._inverse = lru_cache(maxsize=64)(self._rows)

    @property
    def names(self) -> Collection[str]:
        return self.view.bound.by_hf

    @property
    def files(self) -> Sequence[Path]:
        return self.view.source.files

    def spec(self, name: str) -> TensorSpec:
        entry, position = self.view.bound.by_hf[name]
        return TensorSpec(self.view.spec(entry).dtype, entry.hf_shapes[position])

    def _rows(self, name: str) -> tuple[Segment, ...]:
        """Rows of the Megatron tensors, numbered as the name's uses, in the order of its own."""
        found = [
            (row, replace(segment, source=number))
            for number, (entry, position) in enumerate(self.view.bound.uses[name])
            for row, segment in entry.taken(position)
        ]
        return tuple(segment for _, segment in sorted(found, key=lambda item: item[0]))

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        uses = self.view.bound.uses[name]
        width = uses[0][0].row_size * self.spec(name).dtype.itemsize
        if start == stop:
            return
        skip, left = start % width, stop - start
        for segment in clip(self._inverse(name), start // width, -(-stop // width)):
            first = segment.start * width + skip
            size = min(segment.size * width - skip, left)
            yield from self.view.extents(uses[segment.source][0], first, first + size)
            skip, left = 0, left - size


def plan_torch_dist(specs: Iterable[Sequence[tuple[Entry, torch.dtype]]], num_files: int) -> DistPlan:
    """Place one chunk per layer and expert, in order, over files of about equal size.

    specs: entries and their dtypes, in groups that go into one file.
    Raises: ShapeError where tensors that Megatron stacks into one have different dtypes.
    """
    groups = list(specs)
    total = sum(math.prod(entry.shape) * dtype.itemsize for group in groups for entry, dtype in group)
    plan, written = DistPlan(), 0
    for group in groups:
        file = f"__0_{min(written * num_files // max(total, 1), num_files - 1)}.distcp"
        for entry, dtype in group:
            written += _place(plan, entry, dtype, file)
    return plan


def _place(plan: DistPlan, entry: Entry, dtype: torch.dtype, file: str) -> int:
    """Put one entry into a file of the plan. Returns: its bytes."""
    slot = slot_of(entry)
    whole = TensorSpec(dtype, (*slot.lead, *entry.shape))
    if plan.keys.setdefault(slot.key, whole).dtype != dtype:
        raise ShapeError(
            f"{entry.label} is {dtype}, other parts of {slot.key} are {plan.keys[slot.key].dtype}; Megatron keeps "
            "them in one tensor. Convert to one dtype with --torch_dtype bfloat16"
        )
    chunk = TensorSpec(dtype, ((1,) * len(slot.lead)) + entry.shape)
    plan.add((entry.mcore, entry.expert), slot.key, slot.index, chunk, file)
    return chunk.nbytes
