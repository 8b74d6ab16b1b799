"""The registered families and model types. One file a family; the types and their published ids are catalogue.jsonl.

Both are read at the first look-up, so that the files of families can use this module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from swiftlite.families.records import Family, ModelMeta, Release
from swiftlite.utils.errors import ConfigError, UsageError

BUILT_IN = (
    "qwen2", "llama", "qwen3", "qwen2_moe", "qwen3_moe", "internlm3", "mimo", "deepseek_moe", "deepseek_v2",
    "deepseek_v3", "dots1", "ernie4_5", "glm4_moe", "mistral", "mixtral", "ministral", "ministral3", "gemma2",
    "gemma3", "olmo3", "exaone4",
    "glm4", "olmo2", "olmoe", "minimax_m2", "granite", "granitemoe", "hunyuan_v1_dense", "hunyuan_v1_moe", "gpt_oss",
    "phi3", "smollm3", "llama4",
    "seed_oss", "glm4_moe_lite", "hy_v3", "bailing_moe", "deepseek_v32", "glm_moe_dsa",
    "qwen3_next", "qwen3_5", "qwen3_5_moe",
)  # fmt: skip

_FAMILIES: dict[str, Family] = {}
_MODELS: dict[str, ModelMeta] = {}


def register_family(family: Family, *, exist_ok: bool = False) -> Family:
    """Add a family; its model types and architectures are known from then on.

    Raises: UsageError if its name, one of its model types or architectures is taken (exist_ok: a family of the same
        name is replaced).
    """
    _load_built_in()
    if family.name in _FAMILIES and not exist_ok:
        raise UsageError(f"family {family.name!r} is registered already; pass exist_ok=True to replace it")
    for other in _FAMILIES.values():
        taken = set(other.architectures) & set(family.architectures)
        if taken and other.name != family.name:
            raise UsageError(f"{sorted(taken)[0]!r} of family {family.name!r} belongs to family {other.name!r} already")
    _FAMILIES[family.name] = family
    for meta in family.models:
        register_model(meta, exist_ok=exist_ok)
    return family


def register_model(meta: ModelMeta, *, exist_ok: bool = False) -> ModelMeta:
    """Add a model type. Its Megatron side is that of the family which owns its architecture.

    Raises: UsageError if the model type is taken, unless exist_ok.
    """
    _load_built_in()
    if meta.model_type in _MODELS and not exist_ok:
        raise UsageError(f"model type {meta.model_type!r} is registered already; pass exist_ok=True to replace it")
    _MODELS[meta.model_type] = meta
    return meta


@functools.cache
def _load_built_in() -> None:
    _FAMILIES.update({name: import_module(f"swiftlite.families.{name}").FAMILY for name in BUILT_IN})
    _MODELS.update({meta.model_type: meta for meta in _catalogue()})


def _catalogue() -> Iterator[ModelMeta]:
    """The model types of catalogue.jsonl: a line with the record of each, then one line for each of its releases:
    [ModelScope id, Hugging Face id if that is another, patterns of files to leave on the hub].
    """
    types: list[dict[str, Any]] = []
    for line in Path(__file__).with_name("catalogue.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line, object_hook=lambda record: {k: _frozen(v) for k, v in record.items()})
        if isinstance(entry, dict):
            types.append({**entry, "releases": []})
        else:
            types[-1]["releases"].append(Release(*map(_frozen, entry)))
    return (ModelMeta(**{**entry, "releases": tuple(entry["releases"])}) for entry in types)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def families() -> tuple[Family, ...]:
    """All families, the built-in ones first."""
    _load_built_in()
    return tuple(_FAMILIES.values())


def has_family(architecture: str) -> bool:
    """Whether models of this architecture have a Megatron mapping."""
    return any(architecture in family.architectures for family in families())


def family_of(architecture: str) -> Family:
    """The family of what hf_config.architecture_of names. Raises: ConfigError saying what to do where there is none."""
    for family in families():
        if architecture in family.architectures:
            return family
    raise ConfigError(
        f"architecture {architecture} has no Megatron mapping yet; train and merge it with transformers (swiftlite sft, pt, "
        "dpo, infer, export --merge_lora true), or write a family file for it and give that with --custom_register_path "
        "(docs/architecture.md)"
    )


def tiny_configs() -> dict[str, dict[str, dict[str, Any]]]:
    """Model type -> variant -> config.json of a very small model with the type's traits; for self-tests."""
    text = Path(__file__).with_name("tiny_configs.json").read_text(encoding="utf-8")
    configs: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return configs


class _ModelView(Mapping[str, ModelMeta]):
    """The registered models, always up to date."""

    def __getitem__(self, key: str) -> ModelMeta:
        _load_built_in()
        return _MODELS[key]

    def __iter__(self) -> Iterator[str]:
        _load_built_in()
        return iter(tuple(_MODELS))

    def __len__(self) -> int:
        _load_built_in()
        return len(_MODELS)


MODEL_MAPPING: Mapping[str, ModelMeta] = _ModelView()
"""model type -> ModelMeta"""
