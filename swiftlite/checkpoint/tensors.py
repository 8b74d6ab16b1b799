"""The tensors of a model on disk, in either format, under Hugging Face names; what checkpoint.py makes a Checkpoint of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from swiftlite.checkpoint.bind import (
    architecture_of,
    as_backbone,
    bind_map,
    bind_source,
    is_bare,
    naming_of,
    resolve_copy,
    whole_name,
    wrapped_family,
)
from swiftlite.checkpoint.planned import PlannedSource
from swiftlite.checkpoint.side_files import read_manifest
from swiftlite.families import family_of
from swiftlite.families.records import Family
from swiftlite.utils.directories import CARRIED, find_iteration
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.types import Config, Json
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.fp8 import Fp8Source, Scales, open_source, scales_of
from swiftlite.weights.joined import Joined, Parts
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import Beside, Renamed, WeightSource
from swiftlite.weights.torch_dist import HfNames, McoreView


@dataclass(frozen=True)
class ModelTensors:
    """source: single experts, whatever the files hold. names: all tensors, as and in the order that the Hugging Face
    checkpoint has them. copies: tensors that are stored a second time under another name -> the tensor they repeat.
    dtypes: of the values, as the Hugging Face checkpoint has (had) them. files: the Hugging Face shard of each tensor, {}
    where that is not known. ignored: names in the files that are not weights. carried: tensors of other parts than the
    text model, which are copied as they are; whole: they are there, or there is no other part. scales: of the FP8
    checkpoint that the tensors are, or were, read from.
    """

    kind: Literal["hf", "mcore"]
    config: Config
    bound: BoundMap
    source: WeightSource
    names: Sequence[str]
    dtypes: Mapping[str, torch.dtype]
    copies: Mapping[str, str]
    files: Mapping[str, str]
    ignored: Sequence[str] = ()
    carried: Collection[str] = frozenset()
    whole: bool = True
    scales: Scales | None = None

    @property
    def family(self) -> Family:
        return family_of(architecture_of(self.config))

    @property
    def shape(self) -> ModelShape:
        return self.bound.model

    @cached_property
    def stored(self) -> WeightSource:
        """`source` with the tensors of `names` too, of which some may hold many experts."""
        return Joined(self.source, self.bound.fused.values()) if self.bound.fused else self.source


def open_hf(directory: Path, config: Config, weights: bool) -> ModelTensors:
    """Of a model directory. weights: see Checkpoint.open."""
    source: SafetensorsSource
    if weights:
        source = open_source(directory, config)
        if is_bare(source.tensors):
            config, source.tensors = as_backbone(config), {whole_name(n): t for n, t in source.tensors.items()}
    else:
        source = PlannedSource(directory, config)
        config = source.config
    shapes = {name: t.spec.shape for name, t in source.tensors.items()}
    bound = bind_source(config, source, source.tensors).as_stored(shapes)
    coverage = bound.check(shapes, str(directory))
    names = [name for name in source.tensors if name not in coverage.ignored]
    joined = [bound.fused[name] for name in names if name in bound.fused]
    return ModelTensors(
        "hf", config, bound, Parts(source, joined) if joined else source, names,
        dtypes={name: source.value_dtype(name) for name in names},
        copies={copy.name: resolve_copy(copy, bound) for copy in coverage.duplicates},
        files={name: source.tensors[name].file.name for name in names},
        ignored=[*coverage.ignored, *source.left_out], carried=frozenset(coverage.carried),
        scales=source.kept() if isinstance(source, Fp8Source) else None,
    )  # fmt: skip


def open_mcore(directory: Path, root: Path, config: Json, weights: bool) -> ModelTensors:
    """Of a Megatron checkpoint. root: where config.json lies."""
    iteration = find_iteration(directory)
    stored = TorchDistSource(iteration, weights)
    manifest = read_manifest(iteration.parent) or {}
    original = manifest.get("tensors", {})
    others = _open_carried(iteration.parent, root, config)
    naming = naming_of(config, original or (others.names if others else ()))
    bound = bind_map(config, stored.tensors, naming=naming)
    bound = bound.as_stored({name: tensor["shape"] for name, tensor in original.items() if "shape" in tensor})
    source: WeightSource = HfNames(McoreView.open(stored, bound))
    scales = _open_scales(iteration.parent, root, config, manifest)
    kept = set(scales.of.values()) if scales else set()
    carried = [name for name in others.names if bound.is_carried(name) and name not in kept] if others else []
    lost = [name for name in original if bound.is_carried(name) and name not in carried]
    if others and lost:
        raise CheckpointError(f"{others.directory} lacks {lost[0]} ({len(lost)} such tensors); copy it there again")
    if others:
        source = Beside(source, Renamed(others, {name: name for name in carried}))
    copies = {d.name: resolve_copy(d, bound) for d in bound.duplicates if d.name in original}
    known_here = {*bound.by_hf, *bound.fused, *copies, *carried}
    names = [name for name in original if name in known_here]
    if {part for name in names for part in bound.parts(name)} != {*bound.by_hf, *copies, *carried}:
        names = [*bound.stored_names, *copies, *carried]
    known = set(names) <= original.keys()
    dtypes = {n: getattr(torch, original[n]["dtype"]) if n in original else source.spec(bound.parts(n)[0]).dtype
              for n in names}  # fmt: skip
    files = {name: original[name]["file"] for name in names} if known else {}
    return ModelTensors(
        "mcore", config, bound, source, names, dtypes, copies, files, manifest.get("ignored", ()), frozenset(carried),
        whole=others is not None, scales=scales,
    )  # fmt: skip


def _open_carried(beside: Path, root: Path, config: Config) -> SafetensorsSource | None:
    """The tensors of other parts than the text model, of a Megatron checkpoint in `beside`; or those of the Hugging Face
    model in `root` that it comes from. None where there are neither, or where config.json describes no such model."""
    if wrapped_family(config) is None:
        return None
    if (beside / CARRIED).is_dir():
        return SafetensorsSource(beside / CARRIED)
    return open_source(root, config) if any(root.glob("*.safetensors")) else None


def _open_scales(beside: Path, root: Path, config: Config, manifest: Json) -> Scales | None:
    """Those of the FP8 model that a Megatron checkpoint comes from: kept beside it, or in `root`."""
    if (beside / CARRIED).is_dir() and "quantization_config" in manifest:
        return Scales.among(SafetensorsSource(beside / CARRIED), manifest["quantization_config"])
    return scales_of(root, config)
