"""Models that classify or score on the transformers side: ...ForSequenceClassification, its head, what is pooled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftlite.arguments.base import BaseArguments
from swiftlite.checkpoint.info import with_changes
from swiftlite.families.hf_config import classes_of, is_backbone
from swiftlite.utils.errors import ConfigError, UsageError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.types import Config, Json
from swiftlite.weights.head import initial_head

if TYPE_CHECKING:
    from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

# Keys of config.json that say what a head gives.
HEAD_KEYS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")


def classifier_class(config: Config) -> type[AutoModelForSequenceClassification]:
    """transformers' class for it. Raises: ConfigError for a type that has none."""
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not config.get("auto_map"):
        raise ConfigError(
            f"--task_type: the installed transformers has no ...ForSequenceClassification of model type {kind!r}"
        )
    return AutoModelForSequenceClassification


def head_keywords(args: BaseArguments) -> Json:
    """Keywords of from_pretrained for the head that resolved arguments ask for. Raises: UsageError without --num_labels."""
    if args.num_labels is None:
        raise UsageError("--task_type seq_cls: give the number of classes with --num_labels")
    return {} if classes_of(args.model_info.config) is not None else {"num_labels": args.num_labels}


def prepare_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: BaseArguments) -> None:
    """Begin a head that is new, and let config.json say what the head gives and which tokens are padding.

    Raises: UsageError for a model that classifies by another token than the last one.
    """
    info, config = args.model_info, model.config
    head = getattr(model, "score", None)
    if head is None:
        raise UsageError(
            f"{type(model).__name__} has no layer `score` of last tokens, as decoders have; sentence-transformers trains "
            "encoders: CrossEncoderTrainer, or transformers' Trainer"
        )
    if classes_of(info.config) is None:
        if not args.adapters:  # which bring their own
            get_logger().info("the head is new: score.weight %s, by --seed", list(head.weight.shape))
        std = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
        rows, hidden = head.weight.shape
        head.weight.data.copy_(initial_head(rows, hidden, std, args.seed))
    if args.problem_type is not None:
        config.problem_type = args.problem_type  # type: ignore[assignment]  # one of its names
    for part in (config, config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id
    said = {"architectures": [type(model).__name__], **{name: getattr(config, name) for name in HEAD_KEYS[1:]}}
    info.config = with_changes(info.config, said)
    _pool_positions(model)


def head_changes(config: Config) -> Json:
    """What config.json of a written classifier, or of a model without output layer, says besides what its source does."""
    if is_backbone(config):
        return {"architectures": config["architectures"]}
    return {} if classes_of(config) is None else {name: config[name] for name in HEAD_KEYS if name in config}


def _pool_positions(model: PreTrainedModel) -> None:
    """Let the model take `pooled`, int64 [n]: of tokens by number in [B * S], for logits [n, N] of these alone.

    transformers takes each row's last token that is not padding; rows may be several conversations here.
    """
    original = model.forward

    def forward(*args: object, pooled: Tensor | None = None, **kwargs: object) -> object:
        if pooled is None:
            return original(*args, **kwargs)
        from transformers.modeling_outputs import SequenceClassifierOutput

        inputs = {n: v for n, v in kwargs.items() if v is not None and n not in ("labels", "return_dict")}
        hidden = getattr(model, model.base_model_prefix)(*args, **inputs).last_hidden_state
        return SequenceClassifierOutput(logits=model.get_submodule("score")(hidden.flatten(0, 1)[pooled]))

    model.forward = forward  # type: ignore[method-assign]


def last_token(ids: Sequence[int], pad_token: int) -> int:
    """Which token transformers pools of a conversation: the last one that padding has not the id of."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] != pad_token), len(ids) - 1)


def logits_at(model: torch.nn.Module, inputs: dict[str, Tensor], pooled: Tensor) -> Tensor:
    """Logits [n, N] of the pooled tokens. model: perhaps wrapped."""
    found: Tensor = model(**inputs, pooled=pooled).logits
    return found
