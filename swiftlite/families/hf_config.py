"""Hugging Face config.json -> Megatron-LM argument names, by the family's rules. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swiftlite.families import families, family_of, has_family
from swiftlite.families.records import Derived, Family, Refuse, Rules
from swiftlite.families.rope import flatten_config
from swiftlite.utils.errors import ConfigError
from swiftlite.utils.io import blame
from swiftlite.utils.types import Config, Json


def wrapped_family(config: Mapping[str, Any]) -> Family | None:
    """The family of the text part of a model that is more than that; None where config.json describes no such model."""
    name = str((config.get("architectures") or [""])[0])
    kind = str((config.get("text_config") or config).get("model_type"))
    return next((family for family in families() if kind in family.wrappers.get(name, ())), None)


CLASSIFIER = "ForSequenceClassification"
_CAUSAL = "ForCausalLM"
BACKBONE = "Model"  # how transformers names a model without an output layer


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class of the model, or of its text part; of a classifier that of the language model it is made of.

    Raises: ConfigError if config.json names no architecture.
    """
    names = config.get("architectures")
    if not names:
        raise ConfigError("config.json has no 'architectures'; add the model class, such as [\"Qwen3ForCausalLM\"]")
    family = wrapped_family(config)
    return language_model(str(names[0])) if family is None else family.architectures[0]


def language_model(architecture: str) -> str:
    """The class with the same layers that writes text, of one that classifies or has no output layer; any other itself."""
    body = architecture.removesuffix(CLASSIFIER)
    if body == architecture:
        body = architecture.removesuffix(BACKBONE)
        if body == architecture or not has_family(_causal(body)):
            return architecture
    return _causal(body)


def _causal(body: str) -> str:
    return body.removesuffix("Text") + _CAUSAL


def as_backbone(config: Config) -> Json:
    """The config.json of the same model without its output layer."""
    name = str(config["architectures"][0])
    return {**config, "architectures": [name.removesuffix(_CAUSAL) + BACKBONE if name.endswith(_CAUSAL) else name]}


def is_backbone(config: Config | None) -> bool:
    """Has this model no output layer, as embedding models have none?"""
    name = str(((config or {}).get("architectures") or [""])[0])
    return name.endswith(BACKBONE) and has_family(language_model(name))


def classes_of(config: Mapping[str, Any] | None) -> int | None:
    """How many classes or numbers the head of a model gives that classifies, as transformers reads config.json; None for
    a model that writes text.

    Raises: ConfigError for a number that no head has.
    """
    if config is None or not str((config.get("architectures") or [""])[0]).endswith(CLASSIFIER):
        return None
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if not isinstance(count, int) or count < 1:
        raise ConfigError(f"config.json says num_labels {count!r}; a classifier has one or more")
    return count


# Keys that may stand at the top of config.json for its text part; where they stand in both places the top's holds, as in
# transformers 5.
_TOP_KEYS = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text model alone, as if it were no part of another one; the whole of any other model."""
    family = wrapped_family(config)
    if classes_of(config) is not None or is_backbone(config):
        if "text_config" in config:
            raise ConfigError(
                f"{config['architectures'][0]} of a model that reads images too has no Megatron mapping; take that of its "
                "text model"
            )
        return {**config, "architectures": [architecture_of(config)]}
    if family is None:
        return dict(config)
    inner = config.get("text_config") or config
    top = {key: config[key] for key in _TOP_KEYS if config.get(key) is not None}
    return {**family.part_defaults, **inner, **top, "architectures": [family.architectures[0]]}


def convert_hf_config(
    config: Mapping[str, Any], family: Family | None = None, *, patched: bool = True
) -> dict[str, Any]:
    """Convert to Megatron-LM argument names; fields without a value are absent and keep their default.

    Args: family: default, that of the config's architecture. patched: apply what the architecture forces without a key.
    Raises: ConfigError naming what megatron-core cannot compute.
    """
    architecture = architecture_of(config)
    family = family or family_of(architecture)
    with blame("config.json"):
        flat = flatten_config(text_config(config))
        result = _apply(family.config, flat, {})
        if patched:
            result = _apply(family.patches, flat, result)
            result["architectures"] = architecture
    if flat.get("use_bidirectional_attention") or flat.get("is_causal") is False:
        raise ConfigError("this model cannot be converted: its tokens see what follows them, which Megatron's do not")
    labels = classes_of(config)
    if labels is not None or is_backbone(config):  # its head, if any, is no output layer: it is tied to nothing
        result |= {"num_labels": labels or 0, "untie_embeddings_and_output_weights": True}
    return result


def _apply(rules: Rules, config: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    for rule in rules:
        if isinstance(rule, Refuse):
            if rule.when(config):
                raise ConfigError(f"this model cannot be converted: {rule.reason.format_map(config)}")
            continue
        if isinstance(rule, Derived):
            value = rule.compute(config)
        else:
            found = next((config[k] for k in rule.hf if config.get(k) is not None), None)
            value = rule.default if found is None else rule.to_mcore(found) if rule.to_mcore else found
        if value is not None:
            result[rule.field] = value
    return result
