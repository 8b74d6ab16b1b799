"""A family: everything swiftlite knows about models that share one architecture, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from swiftlite.families.meta.mcore import McoreMeta
from swiftlite.families.meta.model import ModelMeta
from swiftlite.families.meta.template import TemplateMeta


@dataclass(frozen=True)
class Family:
    """One data file under families/. The three *_MAPPING registries are views of the registered families.

    `architectures` maps each class name that config.json may carry to this family's Megatron side.
    """

    name: str
    architectures: tuple[str, ...]
    mcore: McoreMeta
    models: tuple[ModelMeta, ...] = ()
    templates: tuple[TemplateMeta, ...] = ()
