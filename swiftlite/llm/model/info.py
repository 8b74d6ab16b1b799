"""Reads what a checkpoint directory says about itself: plain JSON files, the same under every transformers version."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftlite.utils.errors import CheckpointError, UsageError

# Names under which configs state the longest sequence; the smallest one present holds.
MAX_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "seq_len",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
)
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
DTYPES = ("bfloat16", "float16", "float32")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError naming the file and the place of the fault."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or copy the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object; download or copy it again")
    return data


def read_config(model_dir: str) -> dict[str, Any]:
    """Read config.json of a model directory. Raises CheckpointError where there is none, saying what the folder is."""
    path = Path(model_dir) / "config.json"
    if path.is_file():
        return read_json(path)
    if (Path(model_dir) / "latest_checkpointed_iteration.txt").is_file():
        raise CheckpointError(f"{model_dir} is a Megatron checkpoint without config.json; use --mcore_model for it")
    if (Path(model_dir) / "adapter_config.json").is_file():
        raise CheckpointError(f"{model_dir} is an adapter; use --adapters for it and --model for its base model")
    raise CheckpointError(f"{model_dir} has no config.json, so it is no Hugging Face model directory; check the path")


def first_of(config: Mapping[str, Any], *keys: str) -> Any:
    """The first value that is not None under one of `keys`, in the config itself or in its text part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in keys:
                if part.get(key) is not None:
                    return part[key]
    return None


def to_torch_dtype(value: Any) -> Any:
    """A torch.dtype from `torch.bfloat16`, "bfloat16", "torch.bfloat16" or "bf16"; None for None and "auto".

    Raises: UsageError for a dtype that weights cannot have here.
    """
    import torch

    if value is None or value == "auto":
        return None
    name = str(value).removeprefix("torch.")
    name = _DTYPE_ALIASES.get(name, name)
    if name not in DTYPES:
        raise UsageError(f"--torch_dtype {value} is not supported; allowed: {', '.join(DTYPES)}")
    return getattr(torch, name)


def config_dtype(config: Mapping[str, Any]) -> Any:
    """The torch.dtype that the config names (`dtype` is transformers 5's word for `torch_dtype`), or None."""
    quantization = first_of(config, "quantization_config")
    compute = first_of(quantization, "bnb_4bit_compute_dtype") if isinstance(quantization, Mapping) else None
    value = first_of(config, "torch_dtype", "dtype", "params_dtype") or compute
    try:
        return to_torch_dtype(value)
    except UsageError as error:
        raise CheckpointError(
            f"config.json says dtype {value}; allowed: {', '.join(DTYPES)}; give --torch_dtype"
        ) from error


def default_dtype() -> Any:
    """What to use where neither the user nor the config says: bf16 or fp16 by what the GPU can do, fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def max_model_len(config: Mapping[str, Any]) -> int | None:
    """The smallest of the known maximum-length keys, in tokens."""
    values = [first_of(config, key) for key in MAX_LENGTH_KEYS]
    return min((int(v) for v in values if isinstance(v, int | float) and v > 0), default=None)


def rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rope scaling, whichever way it is written; None where frequencies are not scaled.

    transformers 4 writes `rope_scaling` beside `rope_theta`, transformers 5 one `rope_parameters` that is always there.
    """
    value = first_of(config, "rope_scaling", "rope_parameters")
    if not isinstance(value, Mapping):
        return None
    scaling = {k: v for k, v in value.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", scaling.get("type"))
    return scaling if kind not in (None, "default") else None


def quantization(config: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """`(method, bits)` of quantised weights, `(None, None)` for plain ones."""
    entry = first_of(config, "quantization_config")
    if not isinstance(entry, Mapping):
        return None, None
    method = entry.get("quant_method")
    bits = entry.get("bits")
    if method == "bitsandbytes" or entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        method, bits = "bnb", 4 if entry.get("load_in_4bit") else 8
    elif method == "fp8":
        bits = 8
    elif method == "compressed-tensors":
        groups = list((entry.get("config_groups") or {}).values())
        bits = ((groups[0].get("weights") or {}).get("num_bits")) if groups else None
    elif method == "mxfp4":
        bits = 4
    return method, bits


def is_moe(config: Mapping[str, Any]) -> bool:
    """Whether the config describes experts: by its class name, or by one of the keys that only such configs carry."""
    architectures = config.get("architectures") or [""]
    if "moe" in str(architectures[0]).lower() or "moe" in str(config.get("model_type", "")).lower():
        return True
    return any(first_of(config, key) for key in (*MOE_KEYS, "n_routed_experts", "moe_num_experts", "num_local_experts"))


def recorded_args(model_dir: str) -> dict[str, Any]:
    """args.json that an earlier swiftlite command left beside the weights; empty where there is none."""
    path = Path(model_dir) / "args.json"
    return read_json(path) if os.path.isfile(path) else {}
