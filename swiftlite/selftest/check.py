"""`swiftlite check`: shrinks a model to one of the same shape class, converts it both ways and compares logits.

For a user who meets a new checkpoint: seconds on a CPU, only config.json is read, every trait of the model is kept.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch

from swiftlite.arguments.export import CheckArguments
from swiftlite.checkpoint.bind import (
    architecture_of,
    bind_map,
    convert_hf_config,
    flatten_config,
    text_config,
    wrapped_family,
)
from swiftlite.checkpoint.checkpoint import Checkpoint
from swiftlite.checkpoint.info import read_config
from swiftlite.checkpoint.resolve import as_arguments, register_custom
from swiftlite.convert.conversion import Options, convert
from swiftlite.convert.targets import HfTarget, McoreTarget
from swiftlite.families import family_of, tiny_configs
from swiftlite.llm.model.corrections import correct
from swiftlite.utils.errors import UsageError, VerifyError
from swiftlite.utils.logger import get_logger
from swiftlite.utils.text import nearest, some
from swiftlite.utils.types import Config, Json
from swiftlite.weights.shape import ModelShape
from swiftlite.weights.storage import Files, read_tensor

if TYPE_CHECKING:
    from swiftlite.selftest.parity import ParityResult

GRADIENT_TOLERANCE = 1e-4


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
    for key in ("attention_dropout", "router_jitter_noise"):  # gradients are compared
        if small.get(key):
            small[key] = 0.0
    return {**small, "initializer_range": 0.05}


def write_random_model(config: Config, directory: Path, seed: int = 0) -> None:
    """A checkpoint of this config with random fp32 weights under the names of the weight map, MTP blocks included.

    Norms scatter around 1 and biases around 0, so that a norm or bias in the wrong place shows.
    """
    from safetensors.torch import save_file

    family = family_of(architecture_of(config))
    bound = family.weights.bind(ModelShape.from_config(convert_hf_config(config), family.num_mtp(config)))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in bound.stored_names:
        shape = bound.shape(name)
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and not name.endswith("bias")
        tensors[name] = 1 + 0.1 * noise if is_norm else 0.05 * noise
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
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = flatten_config(text_config(config))
    kinds = {name: kind for kind, name in reversed(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    scaling = {k: v for k, v in (text.pop("rope_scaling") or {}).items() if not k.startswith("mrope")}
    return {**text, "rope_scaling": scaling or None, "model_type": kinds[text["architectures"][0]]}


@dataclass(frozen=True)
class CheckResult:
    """logits_error: largest difference of logits / max(1, largest logit), fp32. gradient_error: see there."""

    name: str
    architecture: str
    tensors: int
    logits_error: float
    gradient_error: float
    own_block: str | None
    seconds: float


def check_config(name: str, config: Config, code: Path | None = None) -> CheckResult:
    """Convert a random model of this config, or of its text part alone, there and back and compare logits.

    Args: code: directory whose Python files are the Hugging Face model, trusted; None: transformers or ours.
    Raises: VerifyError if a byte or a logit is off; ConfigError for what cannot be converted.
    """
    from swiftlite.selftest.precision import check_precision

    started, config = time.time(), text_alone(config)
    with tempfile.TemporaryDirectory() as folder:
        hf, mcore = Path(folder, "hf"), Path(folder, "mcore")
        back = Path(folder, "back")
        write_random_model(config, hf)
        for file in code.glob("*.py") if code else ():
            shutil.copy(file, hf)
        source = Checkpoint.open(hf)
        convert(source, McoreTarget(), mcore, Options(quiet=True))
        convert(Checkpoint.open(mcore), HfTarget(), back, Options(quiet=True))
        if (back / "model.safetensors").read_bytes() != (hf / "model.safetensors").read_bytes():
            raise VerifyError(f"{name}: the way back does not give the same bytes; please report this model type")

        options = SimpleNamespace(test_convert_dtype="float32", trust_remote_code=code is not None)
        report = check_precision(source, mcore, options)
        gradient = gradient_error(hf, code is not None)
        if gradient > GRADIENT_TOLERANCE:
            raise VerifyError(f"{name}: gradients are {gradient:.1e} off, allowed {GRADIENT_TOLERANCE:.0e}")
    return CheckResult(
        name, architecture_of(config), len(source.bound.by_hf), report.logits_max_diff / report.scale, gradient,
        ", ".join(source.family.blocks) or None, time.time() - started,
    )  # fmt: skip


def gradient_error(hf_dir: Path, trust_remote_code: bool = False) -> float:
    """Gradients of one masked cross-entropy step, Megatron's under Hugging Face names through the weight map.

    Returns: the largest |g - g'| / max(|g'|, 1e-6 |all g'|) over tensors, in norms, fp32, g' being Hugging Face's.
    Raises: VerifyError if an expert that no token reached has a gradient on one side only.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from swiftlite.arguments.megatron_export import conversion_arguments
    from swiftlite.megatron import hf_io
    from swiftlite.megatron.distributed import parallel_groups
    from swiftlite.megatron.model.provider import build_models
    from swiftlite.selftest.precision_hf import hf_config

    config = read_config(hf_dir)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config["vocab_size"], (2, 160), generator=generator)
    pad = hf_config(hf_dir, trust_remote_code).pad_token_id  # Hugging Face's embedding gives the pad token no gradient
    ids[ids == (-1 if pad is None else pad)] = 5 if pad != 5 else 6
    labels = ids.roll(-1, 1).masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[:, -1] = -100

    def step(model: torch.nn.Module, logits: torch.Tensor) -> None:
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        for parameter in model.parameters():  # so that saving the model saves its gradients
            parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    with tempfile.TemporaryDirectory() as folder:
        theirs, mine = Path(folder) / "hf", Path(folder) / "mcore"
        loaded = hf_config(hf_dir, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            hf_dir, config=loaded, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        model = correct(model).train()
        step(model, model(input_ids=ids, use_cache=False).logits)
        model.save_pretrained(theirs)
        args = conversion_arguments(convert_hf_config(config), str(hf_dir), "float32")
        with parallel_groups(args):
            models = build_models(args)
            hf_io.load_weights(models, hf_dir)
            step(models[0].train(), models[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None))
            hf_io.save_hf_weights(models, mine, hf_dir)
        expected, saved = load_file(theirs / "model.safetensors"), Checkpoint.open(mine).stored
        with Files() as files:
            found = {name: read_tensor(saved, name, files) for name in expected}
    everything = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    worst = 0.0
    buffers = {name for entry in bind_map(config).entries if entry.rule.is_buffer for name in entry.hf}
    for name, reference in expected.items():
        if name in buffers:
            continue  # moved by the router, not by gradients
        norm = float(reference.norm())
        if (norm == 0) != (float(found[name].norm()) == 0):
            raise VerifyError(f"{name} has a gradient on one side only")
        worst = max(worst, float((found[name] - reference).norm()) / max(norm, 1e-6 * everything))
    return worst


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


def _configs(args: CheckArguments, directory: Path | None) -> dict[str, Json]:
    if directory is not None:
        return {str(args.model): shrink_config(text_alone(read_config(directory)))}
    known = tiny_configs()
    if args.model_type == "all":
        return {f"{t}:{v}" if v != "default" else t: c for t, variants in known.items() for v, c in variants.items()}
    if args.model_type not in known:
        hint = nearest(str(args.model_type), known) or f"; some that are: {some(sorted(known))}"
        raise UsageError(f"--model_type {args.model_type}: no such type{hint}")
    return {f"{args.model_type}:{v}": c for v, c in known[args.model_type].items()}


def check_main(args: CheckArguments | Sequence[str]) -> list[CheckResult] | ParityResult:
    """`swiftlite check`. Raises: VerifyError naming the first model and place, or training step, that is off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args = as_arguments(CheckArguments, args)
    register_custom(args.custom_register_path)
    if args.parity:
        from swiftlite.selftest.parity import parity

        return parity(args)
    results = []
    directory = model_directory(args)
    code = directory if args.trust_remote_code else None
    for name, config in _configs(args, directory).items():
        result = check_config(name, config, code)
        results.append(result)
        get_logger().info(
            "%s (%s): %d tensors back bit for bit, logits within %.1e and gradients within %.1e of Hugging Face, %.1f s",
            result.name, result.architecture, result.tensors, result.logits_error, result.gradient_error,
            result.seconds,
        )  # fmt: skip
    return results
