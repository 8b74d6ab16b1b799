"""Reads what a checkpoint directory says about itself: plain JSON files, the same under every transformers version."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftlite.arguments.base import normalize_dtype
from swiftlite.families.blocks import EXPERT_KEYS
from swiftlite.utils.errors import CheckpointError, UsageError
from swiftlite.utils.io import blame, is_inside, read_json
from swiftlite.utils.types import Config, Json

if TYPE_CHECKING:
    import torch

ARGS_FILE = "args.json"
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


@dataclass
class ModelInfo:
    """What one checkpoint directory says about itself. `config`: config.json as a dict; `torch_dtype`: a torch.dtype."""

    model_type: str | None
    model_dir: str
    torch_dtype: torch.dtype
    max_model_len: int | None = None
    quant_method: str | None = None
    quant_bits: int | None = None
    rope_scaling: Json | None = None
    is_moe_model: bool = False
    config: Json | None = None
    task_type: str | None = None
    num_labels: int | None = None
    explanation: str = field(default="", repr=False)


# What a config may say, at most; sizes far beyond any model, but no number that a loop over it would never end.
_TENSOR_COUNTS = ("num_hidden_layers", *EXPERT_KEYS, "num_nextn_predict_layers")  # each has tensors of its own
_COUNTS = (*_TENSOR_COUNTS, "num_attention_heads", "num_key_value_heads", "num_experts_per_tok",
           "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group")  # fmt: skip
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size", "head_dim", "q_lora_rank",
          "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TABLES = ("quantization_config", "text_config", "rope_parameters")
MAX_COUNT, MAX_SIZE = 10_000, 1 << 24
MAX_EXPERTS = 1 << 18  # of all layers together


def check_config(config: Config, path: Path) -> None:
    """Raises: CheckpointError naming a value of config.json that is of a wrong kind or beyond any model."""
    architectures = config.get("architectures")
    if architectures is not None and not _all(architectures, str):
        raise CheckpointError(f"{path}: architectures is {architectures!r}; it must be a list of class names")
    for key, limit in (
        *((k, MAX_COUNT) for k in _COUNTS),
        *((k, MAX_SIZE) for k in _SIZES),
        *((k, None) for k in _IDS),
    ):
        value = config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not _all(values, int):
            raise CheckpointError(f"{path}: {key} is {value!r}; it must be a whole number")
        if limit is not None and not all(0 <= v <= limit for v in values):
            raise CheckpointError(f"{path}: {key} is {value!r}; allowed: 0 to {limit}")
    for key in _TABLES:
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; it must be an object")
    if isinstance(config.get("text_config"), Mapping):
        check_config(config["text_config"], path)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def check_counts(config: Config, num_tensors: int | None, where: object) -> None:
    """Raises: CheckpointError where config.json has more layers or experts than the checkpoint can have tensors for.

    Args: num_tensors: of the checkpoint, or the layers and experts that its tensors hold; None if that is unknown.
    """
    most, together = (
        (MAX_COUNT, MAX_EXPERTS) if num_tensors is None else (max(num_tensors, 256), max(num_tensors, 65536))
    )
    counts = {key: first_of(config, key) for key in _TENSOR_COUNTS}
    layers = counts["num_hidden_layers"]
    for key, value in counts.items():
        if not isinstance(value, int):
            continue
        if value > most or (isinstance(layers, int) and key != "num_hidden_layers" and value * layers > together):
            raise CheckpointError(
                f"{where}: config.json says {key} {value}, the weights are "
                f"{num_tensors if num_tensors is not None else 'of unknown'} tensors; they do not belong together"
            )


def check_against_weights(config: Config, model_dir: str) -> None:
    """Hold the sizes in config.json against the shapes in the weight files, where there are any.

    Raises: CheckpointError for layers, experts or widths beyond what the tensors have, see check_counts.
    """
    num_tensors, longest = _held(Path(model_dir))
    check_counts(config, num_tensors, model_dir)
    if longest is None:
        return
    packed = 32 if first_of(config, "quantization_config") else 1  # several numbers in one
    for key in _SIZES:
        value = first_of(config, key)
        if isinstance(value, int) and value > max(longest * packed, _UNSUSPICIOUS):
            raise CheckpointError(
                f"{model_dir}: config.json says {key} {value}, the longest dimension of its tensors is {longest}; they do "
                "not belong together"
            )


_UNSUSPICIOUS = 1 << 16  # a size that a model may name without having a tensor of it


def _held(directory: Path) -> tuple[int | None, int | None]:
    """How many tensors the weight files have, and their longest dimension; None where only reading them would tell.

    Of files with an index, that of the first and the last one and of the one with the embedding.
    """
    single = directory / "model.safetensors"
    count, files = None, [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).is_file() and not single.is_file():
            with blame(directory / index):
                named = dict(read_json(directory / index)["weight_map"])
                count = len(named)
                embedding = {file for name, file in named.items() if name.endswith(".embed_tokens.weight")}
                files = [f for f in files if f.name in embedding] + files[:1] + files[-1:]
            break
    if not files:
        return count, None
    from swiftlite.weights.safetensors import read_header

    try:
        shapes = [tensor.spec.shape for file in set(files) for tensor in read_header(file).values()]
    except (CheckpointError, OSError):
        return count, None  # whoever reads the weights says what is wrong with them
    return count or len(shapes), max((size for shape in shapes for size in shape), default=None)


def read_config(model_dir: str | Path) -> Json:
    """Read config.json of a model directory. Raises CheckpointError where there is none, saying what the folder is."""
    path = Path(model_dir) / "config.json"
    if path.is_file():
        if not is_inside(path, Path(model_dir)):
            raise CheckpointError(f"{path} is a link out of its directory; put the file itself there")
        config = read_json(path)
        check_config(config, path)
        return config
    if (Path(model_dir) / "latest_checkpointed_iteration.txt").is_file():
        raise CheckpointError(f"{model_dir} is a Megatron checkpoint without config.json; use --mcore_model for it")
    if (Path(model_dir) / "adapter_config.json").is_file():
        raise CheckpointError(f"{model_dir} is an adapter; use --adapters for it and --model for its base model")
    raise CheckpointError(
        f"{model_dir} has no config.json, so it is not a Hugging Face model directory; check the path"
    )


def first_of(config: Config, *keys: str) -> Any:
    """The first value that is not None under one of `keys`, in the config itself or in its text part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            for key in keys:
                if part.get(key) is not None:
                    return part[key]
    return None


def with_changes(config: Config, changes: Mapping[str, object]) -> Json:
    """A config.json with other values, None removes a key; each where it stands, in its text part too, else at the top."""
    changed, text = dict(config), config.get("text_config")
    if isinstance(text, Mapping):
        changed["text_config"] = text = dict(text)
    for key, value in changes.items():
        places = [part for part in (changed, text) if isinstance(part, dict) and key in part] or [changed]
        for part in places:
            if value is None:
                part.pop(key, None)
            else:
                part[key] = value
    return changed


def to_torch_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """A torch.dtype from `torch.bfloat16`, "bfloat16", "torch.bfloat16" or "bf16"; None for None and "auto".

    Raises: UsageError for a dtype that weights cannot have here.
    """
    import torch

    name = normalize_dtype(value)
    dtype: torch.dtype | None = None if name is None else getattr(torch, name)
    return dtype


def config_dtype(config: Config) -> torch.dtype | None:
    """The torch.dtype that the config names (`dtype` is transformers 5's word for `torch_dtype`), or None."""
    quantization = first_of(config, "quantization_config")
    compute = first_of(quantization, "bnb_4bit_compute_dtype") if isinstance(quantization, Mapping) else None
    value = first_of(config, "torch_dtype", "dtype", "params_dtype") or compute
    try:
        return to_torch_dtype(value)
    except UsageError as error:
        raise CheckpointError(
            f"config.json says dtype {value}; allowed: bfloat16, float16, float32; give --torch_dtype"
        ) from error


def default_dtype() -> torch.dtype:
    """What to use where neither the user nor the config says: bf16 or fp16 by what the GPU can do, fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def max_model_len(config: Config) -> int | None:
    """The smallest of the known maximum-length keys, in tokens."""
    values = [first_of(config, key) for key in MAX_LENGTH_KEYS]
    return min((int(v) for v in values if isinstance(v, int | float) and v > 0), default=None)


def rope_scaling(config: Config) -> Json | None:
    """The rope scaling, whichever way it is written; None where frequencies are not scaled.

    transformers 4 writes `rope_scaling` next to `rope_theta`, transformers 5 one `rope_parameters` that is always there.
    """
    value = first_of(config, "rope_scaling", "rope_parameters")
    if not isinstance(value, Mapping):
        return None
    scaling = {k: v for k, v in value.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.get("rope_type", scaling.get("type"))
    return scaling if kind not in (None, "default") else None


def quantization(config: Config) -> tuple[str | None, int | None]:
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


def is_moe(config: Config) -> bool:
    """Whether the config describes experts: by its class name, or by one of the keys that only such configs carry."""
    architectures = config.get("architectures") or [""]
    if "moe" in str(architectures[0]).lower() or "moe" in str(config.get("model_type", "")).lower():
        return True
    return any(first_of(config, key) for key in ("num_experts_per_tok", "moe_intermediate_size", *EXPERT_KEYS))


def describe(config: Json, *, torch_dtype: torch.dtype | None, **known: Any) -> ModelInfo:
    """What config.json says of a model. torch_dtype: to use, where that is settled. known: other fields."""
    method, bits = quantization(config)
    return ModelInfo(
        torch_dtype=torch_dtype or config_dtype(config) or default_dtype(), max_model_len=max_model_len(config),
        quant_method=method, quant_bits=bits, rope_scaling=rope_scaling(config), is_moe_model=is_moe(config),
        config=config, **known,
    )  # fmt: skip


def load_args(directory: str | os.PathLike[str]) -> Json:
    """args.json of a directory that a command wrote, {} if there is none.

    Raises: CheckpointError if the file is not a JSON object.
    """
    return read_json(Path(directory) / ARGS_FILE, optional=True)
