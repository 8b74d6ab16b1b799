"""The small models that are checked: of the same shape class as a given one, or tiny ones of a type; random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from swiftlite.arguments.export import CheckArguments
from swiftlite.checkpoint.bind import architecture_of, convert_hf_config, flatten_config, text_config, wrapped_family
from swiftlite.checkpoint.info import read_config
from swiftlite.families import family_of, tiny_configs
from swiftlite.families.blocks import EXPERT_KEYS
from swiftlite.utils.errors import UsageError
from swiftlite.utils.text import nearest, some
from swiftlite.utils.types import Config, Json
from swiftlite.weights.shape import ModelShape


def shrink_config(config: Config) -> Json:
    """A config of the same shape class: same keys and traits, small sizes.

    Kept: tied or not, biases, norms, rope type and factor, ratio of query to key/value heads, uneven counts, dense and
    MoE layers, shared experts, expert groups, MTP. `original_max_position_embeddings` becomes 64, so that rope scaling
    acts within the test's sequence.
    """
    small = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    for key, limit in family_of(architecture_of(config)).limits().items():
        value = small.get(key)
        if isinstance(value, list):
            small[key] = [min(v, limit) for v in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, limit)
    for key, value in small.items():
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]:  # one entry for each layer
            small[key] = value[: small["num_hidden_layers"]]
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    ratio = config["num_attention_heads"] // groups
    kept = 1 if groups == 1 else 3 if groups % 3 == 0 else 2
    small["num_attention_heads"] = max(2, kept * min(ratio, 3)) if config.get("kv_lora_rank") else kept * min(ratio, 3)
    if "num_key_value_heads" in config:
        small["num_key_value_heads"] = small["num_attention_heads"] if config.get("kv_lora_rank") else kept
    small["hidden_size"] = 32 * small["num_attention_heads"]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(small.get(key), dict) and "original_max_position_embeddings" in small[key]:
            small[key] = {**small[key], "original_max_position_embeddings": 64}
    small |= dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )  # a class's own may be beyond the vocabulary
    for key in EXPERT_KEYS:  # as many in each group
        if isinstance(small.get(key), int) and small.get("n_group"):
            small[key] -= small[key] % small["n_group"]
    for key in small:  # gradients are compared
        if key.endswith("_dropout") or key == "router_jitter_noise":
            small[key] = 0.0
    return {**small, "initializer_range": 0.05}


def write_random_model(config: Config, directory: Path, seed: int = 0) -> None:
    """A checkpoint of this config with random fp32 weights under the names of the weight map, MTP blocks included.

    Norms scatter around 1, those that add 1 and biases around 0, so that a norm or bias in the wrong place shows.
    """
    family = family_of(architecture_of(config))
    converted = convert_hf_config(config)
    bound = family.weights.bind(ModelShape.from_config(converted, family.num_mtp(config)))
    zero_centred = converted.get("layernorm_zero_centered_gamma")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in bound.stored_names:
        shape = bound.shape(name)
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.endswith("bias")
        is_zero = zero_centred and "layernorm" in bound.rule(name).mcore.replace("_", "")
        # A state that forgets within a token has outputs near 0, whose norm makes rounding large; this one remembers.
        centre = -1 if name.endswith("A_log") else 0 if is_zero else 1
        tensors[name] = centre + 0.1 * noise if is_norm else 0.05 * noise
    for duplicate in bound.duplicates:
        if "{layer}" not in duplicate.name and duplicate.name != "lm_head.weight":
            of = duplicate.of if duplicate.of in tensors else "model.embed_tokens.weight"
            tensors[duplicate.name] = tensors[of].clone()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def text_alone(config: Config) -> Json:
    """config.json of the text part of a larger model as a model of its own; any other as it is."""
    if wrapped_family(config) is None:
        return dict(config)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    text = flatten_config(text_config(config))
    name, kind = text["architectures"][0], text["model_type"]
    if CLASSES.get(kind) != name:
        kind = next(other for other, its in CLASSES.items() if its == name)
    scaling = {k: v for k, v in (text.pop("rope_scaling") or {}).items() if not k.startswith("mrope")}
    return {**text, "rope_scaling": scaling or None, "model_type": kind}


def model_directory(args: CheckArguments) -> Path | None:
    """Where --model is, fetched without its weights; None without --model."""
    if args.model is None:
        return None
    directory = Path(args.model).expanduser()
    if not directory.is_dir():
        from swiftlite.checkpoint.registry import get_model_info_meta

        info, _ = get_model_info_meta(
            args.model, use_hf=args.use_hf, hub_token=args.hub_token, download_model=False, need_template=False
        )
        directory = Path(info.model_dir)
    return directory


def configs_of(args: CheckArguments, directory: Path | None) -> dict[str, Json]:
    """Name -> config.json of each model to check: that of --model made small, or the tiny ones of --model_type."""
    if directory is not None:
        return {str(args.model): shrink_config(text_alone(read_config(directory)))}
    known = tiny_configs()
    if args.model_type == "all":
        return {f"{t}:{v}" if v != "default" else t: c for t, variants in known.items() for v, c in variants.items()}
    if args.model_type not in known:
        hint = nearest(str(args.model_type), known) or f"; some that are: {some(sorted(known))}"
        raise UsageError(f"--model_type {args.model_type}: no such type{hint}")
    return {f"{args.model_type}:{v}": c for v, c in known[args.model_type].items()}
