"""`Checkpoint.open(DIR)`: a model in either format, as tensors under Hugging Face names.

Opening one reads headers only. What follows from config.json (family, shape, weight map) is worked out here and nowhere
else. Adapters: adapter.py. No megatron-core, no transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from swiftlite.checkpoint.adapter import Adapter
from swiftlite.checkpoint.bind import architecture_of, bind_map, naming_of, plain_map, resolve_copy, wrapped_family
from swiftlite.checkpoint.chat import copy_chat
from swiftlite.checkpoint.files import copy_side_files
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.new_tokens import enter_tokens
from swiftlite.checkpoint.planned import PlannedSource
from swiftlite.checkpoint.side_files import MANIFEST, read_manifest
from swiftlite.checkpoint.vocabulary import GrownSource, NewTokens, grown, rows_of
from swiftlite.families import family_of, has_family
from swiftlite.families.records import Family
from swiftlite.utils.directories import TRACKER, Directory, find_iteration
from swiftlite.utils.errors import CheckpointError
from swiftlite.utils.io import format_bytes, write_json
from swiftlite.utils.text import some
from swiftlite.utils.types import Config, Json
from swiftlite.weights import stream
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.fp8 import open_source
from swiftlite.weights.joined import Joined, Parts
from swiftlite.weights.lora import A, B
from swiftlite.weights.merged import Merged
from swiftlite.weights.ops import Shape
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import Beside, Files, Renamed, WeightSource
from swiftlite.weights.torch_dist import HfNames, McoreView

# Beside Megatron's checkpoints: the tensors of a model's other parts than its text model, as Hugging Face files.
CARRIED = "carried"


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, with what was asked to be added to it.

    directory: of the weights, as given; root: where config and tokenizer lie. config: config.json with `changes`, the
    keys that differ from the file. source: single experts, whatever the files hold. names: all tensors, as and in the
    order that the Hugging Face checkpoint has them. copies: tensors that are stored a second time under another name ->
    the tensor they repeat. dtypes: of the values, as the Hugging Face checkpoint has (had) them. files: the Hugging Face
    shard of each tensor, {} where that is not known. ignored: names in the files that are not weights.
    carried: tensors of other parts than the text model, which are copied as they are; whole: they are there, or there is
    no other part.
    """

    kind: Literal["hf", "mcore"]
    directory: Path
    root: Path
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
    changes: Mapping[str, object] = field(default_factory=dict)
    new_tokens: NewTokens | None = None
    adapter: Adapter | None = None

    @classmethod
    def open(
        cls, directory: str | Path, *, root: Path | None = None, new_tokens: NewTokens | None = None, weights: bool = True
    ) -> Checkpoint:  # fmt: skip
        """Read what describes the tensors and hold it against config.json.

        Args: root: where config.json and tokenizer lie, if not with the weights. new_tokens: seen with the vocabulary
            rows that they need. weights: False for a plan: the files of weights need not be there.
        Raises: CheckpointError, ConfigError, MapError, ShapeError if files and config.json do not match.
        """
        directory = Path(directory)
        root = root or checkpoint_root(directory)
        config = read_config(root)
        opened = _open_mcore if is_megatron(directory) else _open_hf
        found = opened(directory, root, config, weights)
        return found if new_tokens is None else found._grown(new_tokens)

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

    def shape_of(self, name: str) -> Shape:
        """Of the values of one of `names`."""
        return self.source.spec(name).shape if name in self.carried else self.bound.shape(self.copies.get(name, name))

    @property
    def inputs(self) -> Sequence[Path]:
        """Files that decide what is read."""
        return [*self.source.files, self.root / "config.json", *(self.adapter.inputs if self.adapter else ())]

    @property
    def directories(self) -> Sequence[Path]:
        return [self.directory, self.root, *(self.adapter.directories if self.adapter else ())]

    def summary(self) -> list[str]:
        """Lines about what it holds."""
        lines = [f"{len(self.bound.by_hf)} tensors"]
        if self.carried:
            size = sum(self.source.spec(name).nbytes for name in self.carried)
            parts = sorted({name.removeprefix("model.").split(".")[0] for name in self.carried})
            lines.append(
                f"carried as they are: {len(self.carried)} tensors of other parts than the text model, "
                f"{format_bytes(size)} ({some(parts, 3)})"
            )
        if self.ignored:
            lines.append(f"ignored: {', '.join(self.ignored[:5])}{' ...' if len(self.ignored) > 5 else ''}")
        lines += [f"{name} is a copy of {of}: kept once on Megatron's side" for name, of in self.copies.items()]
        return lines + (self.adapter.summary() if self.adapter else [])

    def _grown(self, new_tokens: NewTokens) -> Checkpoint:
        """The same with rows for new tokens."""
        if new_tokens.rows <= rows_of(self.config):
            return replace(self, new_tokens=new_tokens)
        changes, config = {"vocab_size": new_tokens.rows}, grown(self.config, new_tokens)
        source = GrownSource(self.source, [n for n in self.names if n not in self.carried], new_tokens.rows)
        bound = bind_map(config, self.names) if self.kind == "mcore" else _bound(config, source, self.names)
        return replace(self, config=config, bound=bound, source=source, changes=changes, new_tokens=new_tokens)

    def merged(self, adapter: Adapter) -> Checkpoint:
        """The same with an adapter added: what is read are the sums."""
        pairs = {name for name in adapter.names if name.endswith((A, B))}
        source = Merged(self.source, adapter.source, pairs, adapter.lora, adapter.extras)
        return replace(self, source=source, adapter=adapter)

    def check_whole(self) -> None:
        """Raises: CheckpointError for a Megatron checkpoint of the text part alone of a model that is more than that."""
        if self.bound.naming is not None and not self.whole:
            raise CheckpointError(
                f"{self.directory} holds the text part of {self.config['architectures'][0]} alone, and there is no "
                f"{CARRIED} beside it with the others; give the Hugging Face model that it comes from with --model"
            )

    def check_copies(self) -> None:
        """Raises: CheckpointError if a stored copy differs from its original; Megatron can hold only one of them."""
        if self.kind != "hf":
            return
        source = self.source.base if isinstance(self.source, Merged) else self.source
        with Files() as files:
            for name, of in self.copies.items():
                same = source.spec(name) == source.spec(of)
                for start in range(0, source.spec(of).nbytes if same else 0, stream.BLOCK_BYTES):
                    stop = min(start + stream.BLOCK_BYTES, source.spec(of).nbytes)
                    same = same and _read(source, name, start, stop, files) == _read(source, of, start, stop, files)
                if not same:
                    raise CheckpointError(
                        f"{name} is stored but differs from {of}, though config.json makes them one; "
                        "set tie_word_embeddings to false if the model has a head of its own"
                    )

    def write_side_files(self, target: Path, dtype: torch.dtype | None = None) -> None:
        """config.json, tokenizer and what else lies next to the weights, with new tokens and the chat of an adapter.

        Args: dtype: of the weights.
        """
        copy_side_files(self.root, target, self.changes, dtype)
        if self.new_tokens is not None:
            enter_tokens(target, self.new_tokens.ids)
        if self.adapter is not None:
            copy_chat(self.adapter.root, target)

    def write_manifest(self, directory: Path) -> None:
        """Record names, order, dtypes, shapes and files of the Hugging Face checkpoint, so that the way back has them."""
        if not self.files:
            return
        tensors = {}
        for name in self.names:
            dtype, shape = str(self.dtypes[name]).removeprefix("torch."), list(self.shape_of(name))
            tensors[name] = {"dtype": dtype, "shape": shape, "file": self.files[name]}
        write_json(directory / MANIFEST, {"ignored": list(self.ignored), "tensors": tensors})


def _open_hf(directory: Path, root: Path, config: Json, weights: bool) -> Checkpoint:
    source = open_source(directory, config) if weights else PlannedSource(directory, config)
    bound = _bound(config, source, source.tensors)
    coverage = bound.check({name: t.spec.shape for name, t in source.tensors.items()}, str(directory))
    names = [name for name in source.tensors if name not in coverage.ignored]
    joined = [bound.fused[name] for name in names if name in bound.fused]
    return Checkpoint(
        "hf", directory, root, config, bound, Parts(source, joined) if joined else source, names,
        dtypes={name: source.value_dtype(name) for name in names},
        copies={copy.name: resolve_copy(copy, bound) for copy in coverage.duplicates},
        files={name: source.tensors[name].file.name for name in names},
        ignored=[*coverage.ignored, *source.left_out], carried=frozenset(coverage.carried),
    )  # fmt: skip


def _bound(config: Config, source: WeightSource, names: Iterable[str]) -> BoundMap:
    """The family's map of a Hugging Face checkpoint; without a family its tensors are taken as they are."""
    if has_family(architecture_of(config)):
        return bind_map(config, names)
    return plain_map(config, {name: source.spec(name) for name in names})


def _open_mcore(directory: Path, root: Path, config: Json, weights: bool) -> Checkpoint:
    iteration = find_iteration(directory)
    stored = TorchDistSource(iteration, weights)
    manifest = read_manifest(iteration.parent) or {}
    original = manifest.get("tensors", {})
    others = _open_carried(iteration.parent, root, config)
    naming = naming_of(config, original or (others.names if others else ()))
    bound = bind_map(config, stored.tensors, naming=naming)
    source: WeightSource = HfNames(McoreView.open(stored, bound))
    carried = [name for name in others.names if bound.is_carried(name)] if others else []
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
    return Checkpoint("mcore", directory, root, config, bound, source, names, dtypes, copies, files,
                      manifest.get("ignored", ()), frozenset(carried), others is not None)  # fmt: skip


def _open_carried(beside: Path, root: Path, config: Config) -> SafetensorsSource | None:
    """The tensors of other parts than the text model, of a Megatron checkpoint in `beside`; or those of the Hugging Face
    model in `root` that it comes from. None where there are neither, or where config.json describes no such model."""
    if wrapped_family(config) is None:
        return None
    if (beside / CARRIED).is_dir():
        return SafetensorsSource(beside / CARRIED)
    return open_source(root, config) if any(root.glob("*.safetensors")) else None


def _read(source: WeightSource, name: str, start: int, stop: int, files: Files) -> bytearray:
    data = bytearray(stop - start)
    files.read_into(memoryview(data), source.extents(name, start, stop))
    return data


def is_megatron(directory: Path) -> bool:
    """Whether the weights there are in Megatron's format."""
    found = Directory(directory)
    return not found.has("*.safetensors") and (found.has(TRACKER) or found.iteration is not None)


def checkpoint_root(directory: str | Path) -> Path:
    """Where config.json and the tokenizer of a checkpoint lie."""
    directory = Path(directory)
    return directory if (directory / "config.json").is_file() else find_iteration(directory).parent
