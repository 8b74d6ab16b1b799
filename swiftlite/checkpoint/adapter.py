"""LoRA adapters on disk, of either format, held against their base model. No megatron-core, no transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from swiftlite.arguments.base import PEFT_TUNERS
from swiftlite.checkpoint.chat import copy_chat
from swiftlite.utils.directories import ADAPTER_CONFIG, find_iteration
from swiftlite.utils.errors import CheckpointError, ConfigError
from swiftlite.utils.io import blame, read_json, write_bytes_atomic, write_json
from swiftlite.utils.types import Config
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.lora import (
    FOREIGN,
    PEFT_PREFIX,
    A,
    B,
    ForeignAdapter,
    LoraConfig,
    check_adapter,
    check_values,
    describe,
    unpack_experts,
)
from swiftlite.weights.merged import EMBEDDING, HEAD, Extras, read_extras
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.safetensors import SafetensorsSource
from swiftlite.weights.storage import Renamed, WeightSource

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter of either format, under Hugging Face names without PEFT's prefix.

    root: where adapter_config.json lies. source: all it holds. names: of this, pairs first. extras: what it holds besides
    pairs. described: what adapter_config.json should say, None where the file does already. inputs:
    the files that were read. bound: the base model's map.
    """

    directory: Path
    root: Path
    source: WeightSource
    names: Sequence[str]
    lora: LoraConfig
    extras: Extras
    described: Mapping[str, object] | None
    inputs: Sequence[Path]
    bound: BoundMap

    @classmethod
    def open(cls, directory: Path, bound: BoundMap, plain: bool = True) -> Adapter:
        """Read a PEFT directory or a Megatron adapter checkpoint and hold it against the base model.

        Args: plain: refuse one with biases beside its matrices, which can only be merged.
        Raises: CheckpointError, ConfigError, MapError or ShapeError naming what does not fit.
        """
        is_peft = (directory / ADAPTER_WEIGHTS).is_file()
        root = directory if is_peft else _root(directory)
        config_file = root / ADAPTER_CONFIG
        if not config_file.is_file():
            raise ConfigError(f"{config_file} is missing; it says rank and alpha of the adapter")
        config = read_json(config_file)
        with blame(config_file):
            lora = LoraConfig.from_dict(config)
        source, files, changes = (_open_peft if is_peft else _open_mcore)(directory, bound, lora)
        source = source if is_peft else _with_head(source, config, bound)
        described = {**config, **changes} if changes else None
        source = Renamed(source, {bound.own_name(name): name for name in source.names})
        everything = {name: name for name in source.names}
        extras = read_extras(everything, source, config, bound)
        if plain and extras.biases:
            raise ConfigError(
                f"{directory}: holds biases of LoRA matrices ({next(iter(extras.biases.values()))[0]}); merge it into its "
                "base model with `swiftlite export --merge_lora true`"
            )
        pairs = [name for name in everything if name.endswith((A, B))]
        if not pairs:
            raise CheckpointError(f"{directory} holds no LoRA matrices")
        lora = LoraConfig.from_dict(described) if described else lora
        check_adapter(bound, {name: source.spec(name).shape for name in pairs}, str(directory))
        check_values(source, everything, lora, str(directory))
        names = [*pairs, *(name for name in everything if not name.endswith((A, B)))]
        return cls(directory, root, source, names, lora, extras, described, [*files, config_file], bound)

    @classmethod
    def trained(cls, directory: Path, config: Mapping[str, object], bound: BoundMap) -> Adapter:
        """One that a run has just written to an iteration's directory. config: what adapter_config.json is to say."""
        source, lora = _with_head(TorchDistSource(directory), config, bound), LoraConfig.from_dict(config)
        return cls(directory, directory, source, sorted(source.names), lora, Extras(), config, source.files, bound)

    def peft_name(self, name: str) -> str:
        """What peft calls one of `names`: by the modules of the model that transformers builds."""
        return PEFT_PREFIX + self.bound.module_name(name)

    @property
    def config(self) -> Mapping[str, object]:
        """adapter_config.json as it should be."""
        return self.described or read_json(self.root / ADAPTER_CONFIG)

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank."""
        return {name.removesuffix(A): self.source.spec(name).shape[0] for name in self.names if name.endswith(A)}

    @property
    def pairs(self) -> set[str]:
        """Those of `names` that are matrices of pairs."""
        return {name for name in self.names if name.endswith((A, B))}

    @property
    def directories(self) -> Sequence[Path]:
        return [self.directory, self.root]

    def summary(self) -> list[str]:
        """Lines about what it holds."""
        ranks = ", ".join(map(str, sorted(set(self.ranks.values()))))
        return [f"{len(self.ranks)} modules of rank {ranks}"]

    def check_copies(self) -> None:
        """An adapter stores nothing twice."""

    def write_side_files(self, directory: Path) -> None:
        """adapter_config.json and the chat that was trained."""
        if self.described is None:
            write_bytes_atomic(directory / ADAPTER_CONFIG, (self.root / ADAPTER_CONFIG).read_bytes())
        else:
            write_json(directory / ADAPTER_CONFIG, self.described)
        copy_chat(self.root, directory)


def is_other_kind(directory: Path) -> bool:
    """Whether peft alone reads it: DoRA, an adapter that is no LoRA, or one of an embedding model, whose names are not
    those of the base's files."""
    stated = read_json(directory / ADAPTER_CONFIG, optional=True)
    of_vectors = stated.get("task_type") == "FEATURE_EXTRACTION"
    return stated.get("peft_type") in PEFT_TUNERS.values() or bool(stated.get("use_dora")) or of_vectors


_Opened = tuple[WeightSource, Sequence[Path], Mapping[str, object]]  # source, files, what the config has to say besides


class _PeftSource(Renamed):
    """A PEFT file without its prefix. folder: of unpacked experts, which lives as long as this."""

    def __init__(self, base: SafetensorsSource, bound: BoundMap, folder: tempfile.TemporaryDirectory[str]) -> None:
        begins = _text_part(bound)
        named = {name.removeprefix(PEFT_PREFIX): name for name in base.names}
        super().__init__(
            base, {begins + n.removeprefix(_TEXT_PART) if n.startswith(_TEXT_PART) else n: s for n, s in named.items()}
        )
        self.folder = folder


# How names in the text part of a model that reads images begin: in transformers' models, and in files.
_TEXT_PART = "model.language_model."
_TEXT_PART_IN_FILES = (_TEXT_PART, "language_model.model.", "model.")


def _text_part(bound: BoundMap) -> str:
    return next(
        p for p in (*_TEXT_PART_IN_FILES, "") if any(name.startswith(f"{p}layers.") for name in bound.by_hf) or not p
    )


def _open_peft(directory: Path, bound: BoundMap, lora: LoraConfig) -> _Opened:
    stored, folder = SafetensorsSource(directory), tempfile.TemporaryDirectory()
    file = directory / ADAPTER_WEIGHTS
    facts = unpack_experts(file, bound.model, lora, Path(folder.name) / ADAPTER_WEIGHTS)
    source = _PeftSource(SafetensorsSource(Path(folder.name)) if facts else stored, bound, folder)
    return source, [file], describe(facts) if facts else {}


def _open_mcore(directory: Path, bound: BoundMap, _: LoraConfig) -> _Opened:
    stored = TorchDistSource(find_iteration(directory))
    pairs = filter(None, map(FOREIGN.fullmatch, stored.names))
    if all(bound.own_name(f"{pair[1]}.weight") in bound.by_hf for pair in pairs):
        return stored, stored.files, {}
    source = ForeignAdapter(stored, bound)
    return source, stored.files, {"target_modules": sorted({_module(n).rpartition(".")[2] for n in source.names})}


def _with_head(source: WeightSource, config: Config, bound: BoundMap) -> WeightSource:
    """A Megatron adapter with the output layer's copy of a tied embedding that is trained, as peft writes it."""
    embedding, head = bound.own_name(EMBEDDING), bound.own_name(HEAD)
    if not config.get("ensure_weight_tying") or embedding not in source.names or head in source.names:
        return source
    return Renamed(source, {**{name: name for name in source.names}, head: embedding})


def _module(name: str) -> str:
    return name.removesuffix(A).removesuffix(B)


def _root(directory: Path) -> Path:
    try:
        return find_iteration(directory).parent
    except CheckpointError:
        raise CheckpointError(
            f"{directory} is not an adapter: it has neither {ADAPTER_WEIGHTS} nor a Megatron checkpoint"
        ) from None
