"""The weight map of the model that a config.json describes. Imports no megatron.core."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from swiftlite.families import family_of
from swiftlite.families.hf_config import architecture_of, convert_hf_config
from swiftlite.families.rope import flatten_config
from swiftlite.weights.rule import BoundMap
from swiftlite.weights.shape import ModelShape

__all__ = ["architecture_of", "bind_map", "convert_hf_config", "flatten_config"]


def bind_map(config: Mapping[str, Any], names: Iterable[str] = ()) -> BoundMap:
    """The weight map of the model that a config.json describes.

    Args: names: tensors of the checkpoint, under Hugging Face or Megatron names. config.json may announce MTP blocks
        that the files do not have (transformers drops them when it saves); such a model is bound without them.
    """
    family = family_of(architecture_of(config))
    shape = ModelShape.from_config(convert_hf_config(config, family))
    num_mtp = int(config.get("num_nextn_predict_layers") or 0) if family.mcore.weights.mtp_layer else 0
    if num_mtp:
        with_mtp = family.mcore.weights.bind(replace(shape, num_mtp=num_mtp))
        plain = set(family.mcore.weights.bind(shape).by_hf)
        blocks = {name for name in with_mtp.by_hf if name not in plain}
        if any(name in blocks or name.startswith("mtp.") for name in names):
            return with_mtp
    return family.mcore.weights.bind(shape)
