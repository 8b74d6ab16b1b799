"""`resolve` for the Megatron side: the model's facts plus its config under Megatron's names."""

from __future__ import annotations

from typing import Any

from swiftlite.llm.pipeline import resolve
from swiftlite.utils.errors import CheckpointError


def resolve_megatron(args: Any, **kwargs: Any) -> Any:
    """`swiftlite.llm.pipeline.resolve`, then the model's fields from config.json. `args` is changed and returned.

    Args: kwargs: those of `resolve`.
    Raises: as `resolve`; UsageError where the layout does not fit the model; ConfigError for a model that megatron-core
        cannot compute.
    """
    from swiftlite.checkpoint.bind import convert_hf_config

    resolve(args, **kwargs)
    if args.model_info.config is None:
        raise CheckpointError(f"{args.model_info.model_dir}: config.json is missing")
    args.apply_model_config(convert_hf_config(args.model_info.config))
    return args
