"""Models that give scores: what config.json says of a classifier's head, and a language model seen with a new one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from swiftlite.arguments.base import BaseArguments
from swiftlite.checkpoint.adapter import ADAPTER_WEIGHTS
from swiftlite.checkpoint.bind import bind_map
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import first_of, with_changes
from swiftlite.checkpoint.vocabulary import grown
from swiftlite.families.hf_config import BACKBONE, CLASSIFIER, classes_of, is_backbone, wrapped_family
from swiftlite.utils.directories import find_iteration
from swiftlite.utils.errors import ConfigError, UsageError
from swiftlite.utils.io import read_json
from swiftlite.utils.types import Config, Json
from swiftlite.weights.dcp_file import TorchDistSource
from swiftlite.weights.head import HEAD, Headed, initial_head
from swiftlite.weights.lora import PEFT_PREFIX
from swiftlite.weights.safetensors import SafetensorsSource


@dataclass(frozen=True)
class Head:
    """A score head in the place of an output layer, or nothing (num_labels 0). seed: of its weights, None for one that the
    model has. changes: what config.json says of it.
    """

    num_labels: int
    seed: int | None
    changes: Mapping[str, object]


def head_of(args: BaseArguments, config: Config, pad_token_id: int | None = None) -> Head | None:
    """The head that a run with these arguments gives a model of this config.json; None where the model writes text.

    Raises: as plan_head; UsageError where nothing says how many scores there are, or a classifier is to write text.
    """
    has = classes_of(config)
    if args.task_type == "embedding":
        return Head(0, None, {"architectures": [backbone_of(config)]})
    if args.has_head:
        num_labels = args.num_labels or has
        if num_labels is None:
            raise UsageError("--task_type seq_cls: give the number of classes with --num_labels")
        return plan_head(config, num_labels, getattr(args, "seed", 0), args.problem_type, pad_token_id)
    if is_backbone(config):
        raise UsageError(
            f"{config['architectures'][0]} has no output layer, so it writes no text; add --task_type embedding"
        )
    if has is not None:
        raise UsageError(
            f"{config['architectures'][0]} gives {has} scores, not text; add --task_type seq_cls, or take its base model"
        )
    return None


def plan_head(
    config: Config, num_labels: int, seed: int, problem_type: str | None = None, pad_token_id: int | None = None
) -> Head:
    """The head with which a model of this config.json gives `num_labels` scores: its own, or a new one.

    Raises: UsageError for a classifier of other labels; ConfigError where transformers has no such classifier.
    """
    has = classes_of(config)
    said = {"problem_type": problem_type, "pad_token_id": pad_token_id}
    changes: Json = {key: value for key, value in said.items() if value is not None}
    if has not in (None, num_labels):
        raise UsageError(f"--num_labels {num_labels}: the model's head has {has}; leave it out, or take its base model")
    if has is not None:
        return Head(num_labels, None, changes)
    names = {str(i): f"LABEL_{i}" for i in range(num_labels)}
    labels = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
    return Head(num_labels, seed, {"architectures": [classifier_of(config)], **labels, **changes})


def head_of_adapter(directory: Path, config: Config, root: Path) -> Head | None:
    """That of the model which an adapter belongs to, where it holds one. config, root: of its base model."""
    rows = rows_of_head(directory)
    return None if rows is None else plan_head(config, rows, 0, pad_token_id=padding_of(root))


def rows_of_head(directory: Path) -> int | None:
    """Of the score head that an adapter holds; None without one."""
    is_peft = (directory / ADAPTER_WEIGHTS).is_file()
    source = SafetensorsSource(directory) if is_peft else TorchDistSource(find_iteration(directory))
    held = next((name for name in source.names if name.removeprefix(PEFT_PREFIX) == HEAD), None)
    return None if held is None else source.spec(held).shape[0]


def padding_of(root: Path) -> int | None:
    """Number of the padding token by which transformers' classifiers find the last one, as the tokenizer's files have it."""
    stated = read_json(root / "tokenizer_config.json", optional=True)
    pad = stated.get("pad_token")
    pad = pad.get("content") if isinstance(pad, Mapping) else pad
    known = {int(i): token for i, token in (stated.get("added_tokens_decoder") or {}).items()}
    for token in read_json(root / "tokenizer.json", optional=True).get("added_tokens") or ():
        known.setdefault(token["id"], token)
    return next((i for i, token in known.items() if pad is not None and token["content"] == pad), None)


def classifier_of(config: Config) -> str:
    """transformers' class that classifies with a language model. Raises: ConfigError where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    return _class_in(CLASSES, config, CLASSIFIER)


def backbone_of(config: Config) -> str:
    """transformers' class of a language model without its output layer. Raises: ConfigError where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES as CLASSES

    return _class_in(CLASSES, config, BACKBONE)


def _class_in(classes: Mapping[str, object], config: Config, kind: str) -> str:
    name, model_type = str((config.get("architectures") or [""])[0]), config.get("model_type")
    found = classes.get(str(model_type))
    if found is None or wrapped_family(config) is not None:
        raise ConfigError(
            f"transformers has no {kind} class of {name} (model_type {model_type!r}); take another base model"
        )
    return str(found)


def headed(config: Config, head: Head | None) -> Json:
    """config.json of the model with this head."""
    return with_changes(config, head.changes if head is not None else {})


def trained_config(args: BaseArguments, config: Config) -> Json:
    """config.json of what a run trains: with rows for its new tokens and the head that it asks for. Raises: as head_of."""
    return headed(grown(config, args.new_tokens), head_of(args, config))


def with_head(source: Checkpoint, head: Head | None) -> Checkpoint:
    """A model seen with this head; a language model without its own output layer and MTP blocks."""
    if head is None:
        return source
    config, changes = headed(source.config, head), {**source.changes, **head.changes}
    if head.seed is None and head.num_labels:
        return replace(source, config=config, changes=changes)
    bound = bind_map(config).as_stored({n: source.shape_of(n) for n in source.bound.fused if n in source.names})
    kept = [name for name in source.names if all(part in bound.by_hf for part in bound.parts(name))]
    dtypes = {name: source.dtypes[name] for name in kept}
    if head.seed is None:
        return replace(source, config=config, changes=changes, bound=bound, names=kept, copies={}, dtypes=dtypes)
    std = float(first_of(config, "initializer_range") or 0.02)
    values = initial_head(head.num_labels, bound.model.hidden, std, head.seed)
    return replace(
        source, config=config, changes=changes, bound=bound, source=Headed(source.source, values),
        names=[*kept, HEAD], copies={}, dtypes={**dtypes, HEAD: dtypes[kept[-1]]},
        files={**source.files, HEAD: source.files[kept[-1]]} if source.files else {},
    )  # fmt: skip
