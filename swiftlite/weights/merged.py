"""A base checkpoint with an adapter added, seen as a checkpoint; and what an adapter holds besides pairs of matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from swiftlite.utils.errors import ConfigError, MapError, ShapeError
from swiftlite.utils.types import Config
from swiftlite.weights import head as scores
from swiftlite.weights.lora import A, B, LoraConfig
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.storage import Extent, Files, TensorSpec, WeightSource, Wrapped, read_tensor

B_BIAS, TOKENS = ".lora_B.bias", ".token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Extras:
    """What takes the place of base weights, or is added to them, by the names of those; values: names in the adapter.

    whole: tensors of `modules_to_save` and trained biases. rows: (name, numbers of the rows) of `trainable_token_indices`.
    biases: bias -> (bias of a pair, the pair's module).
    """

    whole: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, Sequence[int]]] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.whole or self.rows or self.biases)


def read_extras(names: Mapping[str, str], source: WeightSource, config: Config, bound: BoundMap) -> Extras:
    """The tensors of an adapter that are not pairs. names: name without prefix -> name in `source`.

    Raises: MapError, ShapeError for what belongs to no base weight; ConfigError where tied weights were trained apart.
    """
    whole = {}
    rows, biases = {}, {}
    for name, stored in names.items():
        shape = source.spec(stored).shape
        if name.endswith((A, B)):
            continue
        if name.endswith(B_BIAS):
            module = name.removesuffix(B_BIAS)
            target, wanted = f"{module}.bias", _shape(bound, f"{module}.bias", name)
            biases[target] = stored, module
        elif name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            target, numbers = f"{module}.weight", _rows_of(module, config)
            vocabulary, width = _shape(bound, target, name)
            wanted = (len(numbers), width)
            if any(not 0 <= number < vocabulary for number in numbers):
                raise ShapeError(f"{name}: names row {max(numbers)}, the base model has {vocabulary}")
            rows[target] = stored, numbers
        else:
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            tied = bound.model.tied and target == bound.own_name(HEAD)
            wanted = _shape(bound, bound.own_name(EMBEDDING) if tied else target, name)
            whole[target] = stored
        if tuple(shape) != wanted:
            raise ShapeError(f"{name} has shape {list(shape)}, the base model needs {list(wanted)}")
    for key, found in (("modules_to_save", whole), ("trainable_token_indices", rows)):
        for module in _modules(config, key):
            if module == "classifier" and scores.HEAD in whole:
                continue  # peft names both that models of SEQ_CLS may have
            if not any(f".{target}".rpartition(".")[0].endswith(f".{module}") for target in found):
                raise MapError(f"adapter_config.json: {key} names {module}, but the adapter holds no such tensor")
    _check_tied(whole, source, config, bound)
    return Extras(whole, rows, biases)


def _shape(bound: BoundMap, target: str, name: str) -> tuple[int, ...]:
    if target not in bound.by_hf:
        raise MapError(f"{name} of the adapter: the base model has no {target}, so it cannot be merged")
    entry, position = bound.by_hf[target]
    return entry.hf_shapes[position]


def _rows_of(module: str, config: Config) -> Sequence[int]:
    for key in _modules(config, "trainable_token_indices"):
        stated = config["trainable_token_indices"]
        numbers = stated[key] if isinstance(stated, Mapping) else stated
        if module == key or module.endswith(f".{key}"):
            return [int(number) for number in numbers]
    raise ConfigError(f"adapter_config.json: trainable_token_indices does not say which rows {module} has trained")


def _modules(config: Config, key: str) -> list[str]:
    """The modules that a key of adapter_config.json names; a bare list of rows is about the embedding."""
    stated = config.get(key) or []
    bare = key == "trainable_token_indices" and not isinstance(stated, Mapping)
    return ["embed_tokens"] if stated and bare else list(stated)


def _check_tied(whole: dict[str, str], source: WeightSource, config: Config, bound: BoundMap) -> None:
    """Embedding and head of a tied model are one weight: both must have been trained as one, and the head's copy goes."""
    embedding, head = bound.own_name(EMBEDDING), bound.own_name(HEAD)
    if not bound.model.tied or not (whole.keys() & {embedding, head}):
        return
    if {embedding, head} <= whole.keys():
        with Files() as files:
            equal = torch.equal(*(read_tensor(source, whole[name], files) for name in (embedding, head)))
    else:
        equal = embedding in whole and bool(config.get("ensure_weight_tying"))
    if not equal:
        raise ConfigError(
            f"adapter_config.json: modules_to_save {config.get('modules_to_save')} trained embedding and output layer "
            "apart, which are one weight in the base model; train with ensure_weight_tying, or without modules_to_save"
        )
    whole.pop(head, None)


class Merged(Wrapped):
    """A base checkpoint with an adapter added: W + scale B A, in fp32, row block by row block.

    Wraps any source of base weights under Hugging Face names; `decode` does the work while weights are read.
    """

    def __init__(
        self, base: WeightSource, adapter: WeightSource, pairs: Collection[str], config: LoraConfig, extras: Extras
    ) -> None:
        """pairs: names in `adapter` of the pairs."""
        super().__init__(base)
        self.adapter, self.pairs = adapter, pairs
        self.config, self.extras = config, extras
        self.decodes = True
        self._pair = lru_cache(maxsize=8)(self._read_pair)
        self._small = lru_cache(maxsize=8)(self._read_small)

    def spec(self, name: str) -> TensorSpec:
        whole = self.extras.whole.get(name)
        return self.base.spec(name) if whole is None else self.adapter.spec(whole)

    def extents(self, name: str, start: int, stop: int) -> Iterator[Extent]:
        whole = self.extras.whole.get(name)
        source, name = (self.base, name) if whole is None else (self.adapter, whole)
        return source.extents(name, start, stop)

    def read(self, name: str, first: int, out: Tensor, files: Files) -> None:
        whole = self.extras.whole.get(name)
        source, name = (self.base, name) if whole is None else (self.adapter, whole)
        source.read(name, first, out, files)

    def _read_small(self, name: str) -> Tensor:
        with Files() as files:
            return read_tensor(self.adapter, name, files).float()

    def _read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        with Files() as files:
            a, b = (read_tensor(self.adapter, module + suffix, files).float() for suffix in (A, B))
        return a, b * self.config.scale(module, a.shape[0])

    def decode(self, name: str, row: int, column: int, raw: Tensor) -> Tensor:
        if name in self.extras.whole:
            return raw
        values = self.base.decode(name, row, column, raw)
        if name in self.extras.biases:
            stored, module = self.extras.biases[name]
            scale = self.config.scale(module, self._pair(module)[0].shape[0])
            return values.float() + scale * self._small(stored)[column : column + raw.shape[1]]
        if name in self.extras.rows:
            stored, numbers = self.extras.rows[name]
            values = values.float().clone()
            for i, number in enumerate(numbers):
                if row <= number < row + raw.shape[0]:
                    values[number - row] = self._small(stored)[i, column : column + raw.shape[1]]
            return values
        module = name.removesuffix(".weight")
        if module + A not in self.pairs:
            return values
        a, b = self._pair(module)
        rows, columns = slice(row, row + raw.shape[0]), slice(column, column + raw.shape[1])
        return torch.addmm(values.float(), b[rows], a[:, columns])
