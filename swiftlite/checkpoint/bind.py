"""The weight map of the model that a config.json describes. Imports no megatron.core."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from swiftlite.checkpoint.info import check_counts
from swiftlite.families import family_of, has_family
from swiftlite.families.hf_config import architecture_of, as_backbone, convert_hf_config, text_config, wrapped_family
from swiftlite.families.records import Family
from swiftlite.families.rope import flatten_config
from swiftlite.utils.io import blame
from swiftlite.utils.types import Config
from swiftlite.weights.rule import NAMINGS, BoundMap, Duplicate, Naming, Source, WeightMap, WeightRule
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import TensorSpec, WeightSource

__all__ = [
    "architecture_of", "as_backbone", "bind_map", "convert_hf_config", "flatten_config", "text_config", "wrapped_family",
]  # fmt: skip

EMBEDDING = "model.embed_tokens.weight"
_AROUND = "model."  # how names begin in models with an output layer


def is_bare(names: Iterable[str]) -> bool:
    """Has the class of a model without its output layer written these tensors, such as those of Qwen3-Embedding?"""
    held = set(names)
    return EMBEDDING.removeprefix(_AROUND) in held and EMBEDDING not in held


def whole_name(name: str) -> str:
    """What a tensor of such a model is called in one with an output layer."""
    return _AROUND + name


def naming_of(config: Config, names: Iterable[str]) -> Naming | None:
    """How the tensors of the text part of a larger model are called among `names`, those of the Hugging Face checkpoint;
    as transformers calls them where that is not known. None for a model that is all text."""
    if wrapped_family(config) is None:
        return None
    held = set(names)
    return next((naming for naming in NAMINGS if naming(EMBEDDING) in held), NAMINGS[0])


def bind_map(
    config: Config, names: Iterable[str] = (), *, with_mtp: bool = False, naming: Naming | None = None
) -> BoundMap:
    """The weight map of the model that a config.json describes, of one that is more than text that of its text part.

    Args: names: tensors of the checkpoint, under Hugging Face or Megatron names. config.json may announce MTP blocks
        that the files do not have (transformers drops them when it saves); such a model is bound without them.
        with_mtp: with these blocks, whatever the names. naming: see naming_of; default, by the names.
    """
    family = family_of(architecture_of(config))
    check_counts(config, _held(names), "the checkpoint")
    converted = convert_hf_config(config, family)
    with blame("config.json"):
        shape, naming = ModelShape.from_config(converted), naming or naming_of(config, names)
        return _bind(family, shape, text_config(config), names, with_mtp, naming)


def bind_source(config: Config, source: WeightSource, names: Iterable[str]) -> BoundMap:
    """The map of a checkpoint that has these names; without a family its tensors are taken as they are."""
    if has_family(architecture_of(config)):
        return bind_map(config, names)
    return plain_map(config, {name: source.spec(name) for name in names})


def resolve_copy(duplicate: Duplicate, bound: BoundMap) -> str:
    """The tensor that holds the bytes of a stored copy; a tied model's head is its embedding."""
    return duplicate.of if duplicate.of in bound.by_hf else bound.own_name(EMBEDDING)


def plain_map(config: Config, specs: Mapping[str, TensorSpec]) -> BoundMap:
    """A map of tensors to themselves, for a checkpoint whose architecture has no family: what merging and comparing need.

    Args: specs: of all tensors of the checkpoint.
    """
    text = {**config, **(config.get("text_config") or {})}
    sizes = {key: int(text.get(key) or 0) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    embedding = any(name.endswith("embed_tokens.weight") for name in specs)
    shape = ModelShape(
        num_layers=sizes["num_hidden_layers"], hidden=sizes["hidden_size"], vocab=sizes["vocab_size"], heads=0, groups=0,
        head_dim=0, ffn=0, moe_layers=(), tied=embedding and "lm_head.weight" not in specs,
    )  # fmt: skip
    rules = [WeightRule(name, (Source(name, tuple(spec.shape)),)) for name, spec in specs.items()]
    return WeightMap(tuple(rules), ()).bind(shape)


def _held(names: Iterable[str]) -> int | None:
    """How many tensors of one layer and expert the checkpoint holds, at most; None where only names are known."""
    count = 0
    for name, tensor in names.items() if isinstance(names, Mapping) else ():
        shape = getattr(getattr(tensor, "spec", None), "shape", ())
        stacked = 2 if len(shape) > 2 and "experts" in name else 1 if name.startswith("decoder.layers.") else 0
        count += math.prod(shape[:stacked])
    return count or None


def _bind(
    family: Family, shape: ModelShape, config: Config, names: Iterable[str], always: bool, naming: Naming | None
) -> BoundMap:
    num_mtp = family.num_mtp(config)
    if num_mtp:
        with_mtp = family.weights.bind(replace(shape, num_mtp=num_mtp)).named(naming)
        blocks = {n for n, uses in with_mtp.uses.items() if all(entry.stack == "mtp.layers" for entry, _ in uses)}
        if always or any(name in blocks or name.startswith("mtp.") for name in names):
            return with_mtp
    return family.weights.bind(shape).named(naming)
